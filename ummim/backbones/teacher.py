"""A frozen ViT that tells a student what whole images look like to it: TEC's teacher.

Source: "Towards Sustainable Self-supervised Learning" (TEC; Gao et al., 2022), section 3.
"""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ummim.checkpoint_file import key_faults, read_checkpoint_file
from ummim.nn.attention import exact_product
from ummim.nn.layers import exact, take

UNTRAINED = "untrained"
CONTAINERS = ("state_dict", "model", "student")
PREFIX = "module.backbone."  # of the encoder in iBOT's and DINO's ``student``
# Parts of pre-training checkpoints that are no part of the features: heads, decoders, tokens for masked patches.
NOT_NEEDED = ("norm.", "fc_norm.", "head.", "decoder_", "mask_token", "masked_embed", "vis_mask_token", "pr_dwconv.")


@dataclass(frozen=True)
class TeacherConfig:
    """A frozen teacher and what it teaches.

    Attributes:
        name: timm's name of the ViT, which has the student's width, heads and grid, and a class token.
        checkpoint: file of its weights: iBOT's, MAE's (encoder or whole), timm's or ``ummim export``'s, by torch.save
            or safetensors. ``untrained`` takes random weights, which teach nothing: for trials.
        layers: the features are the mean of this many last blocks' outputs.
        top_k: attention is taught of the class token and of this many patches that it attends to most (iBOT: 9,
            MAE: 15).
        temperature: the teacher's attention logits are divided by it (iBOT: 1.0, MAE ViT-B: 1.8, ViT-L: 1.4).
    """

    name: str = "vit_base_patch16_224"
    checkpoint: str = ""
    layers: int = 2
    top_k: int = 9
    temperature: float = 1.0


class Lesson(NamedTuple):
    """What a teacher sees in whole images."""

    features: Tensor  # (B, N, D) of the patches, row-major
    queries: Tensor  # (B, k) int64: the patches that the class token attends to most
    attention: Tensor  # (B, heads, 1 + k, N): logits of the class token's and those patches' queries over all patches


class Teacher(nn.Module):
    """A ViT that is never trained, and never leaves eval mode.

    Its weights are buffers outside the state dict: they move with the module, but no optimizer holds them, no
    checkpoint repeats them (they come from the recipe's file again), and under ZeRO-3 every rank has them whole
    instead of gathering them in each step. As buffers they stay float32 under an engine that casts parameters;
    the products run in the student's 16 bits.

    Args:
        vit: what :func:`build_vit` gives, its weights loaded.
        layers: the features are the mean of this many last blocks' outputs.
        top_k: patches whose attention is taught.
    """

    def __init__(self, vit: VisionTransformer, layers: int, top_k: int) -> None:
        super().__init__()
        self.vit, self.layers, self.top_k = vit, layers, top_k
        for module in vit.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, dtype: torch.dtype) -> Lesson:
        """(B, 3, H, W) normalised images -> what to learn; ``dtype`` is the student's, and that of large products."""
        with _precision(images, dtype):
            outputs: Any = self.vit.forward_intermediates(
                images,
                indices=max(2, self.layers),
                return_prefix_tokens=True,
                output_fmt="NLC",
                intermediates_only=True,
            )  # of the last blocks: patches (B, N, D), class token (B, 1, D)
            patches, cls = outputs[-2]  # the last block's input
            tokens = self.last.norm1(torch.cat([cls, patches], dim=1))  # (B, 1 + N, D)
        k = self.project(tokens[:, 1:], 1, dtype).transpose(2, 3)  # (B, heads, d, N)
        seen = exact_product(self.project(tokens[:, :1], 0, dtype), k)  # (B, heads, 1, N), the class token's
        queries = seen.mean(1)[:, 0].topk(self.top_k).indices  # (B, k)
        chosen = torch.cat([tokens[:, :1], take(tokens[:, 1:], queries)], dim=1)  # (B, 1 + k, D)
        attention = exact_product(self.project(chosen, 0, dtype) * self.last.attn.scale, k)  # (B, heads, 1 + k, N)
        features = torch.stack([exact(tokens) for tokens, _ in outputs[-self.layers :]]).mean(0)
        return Lesson(features, queries, attention)

    @property
    def last(self) -> Any:
        """The last block."""
        return self.vit.blocks[-1]

    def project(self, tokens: Tensor, part: int, dtype: torch.dtype) -> Tensor:
        """(B, n, D) -> the last block's queries (part 0) or keys (1), (B, heads, n, D / heads), float32 or better."""
        attn = self.last.attn
        bias = None if attn.qkv.bias is None else attn.qkv.bias.chunk(3)[part]
        with _precision(tokens, dtype):
            x = F.linear(tokens, attn.qkv.weight.chunk(3)[part], bias)
            x = x.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
            return exact((attn.k_norm if part else attn.q_norm)(x))


def build_vit(name: str, image_size: int) -> VisionTransformer:
    """A timm ViT without head and final norm, with random weights.

    Raises:
        ValueError: no such model, or one whose attention of a class token cannot be read off.
    """
    if not timm.is_model(name):
        raise ValueError("timm has no such model; vit_base_patch16_224 and vit_large_patch16_224 are TEC's")
    try:
        vit: Any = timm.create_model(name, num_classes=0, global_pool="token", img_size=image_size)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"timm cannot build it for {image_size} pixels without a head: {error}") from None
    if not (
        isinstance(vit, VisionTransformer)
        and vit.has_class_token
        and vit.num_prefix_tokens == 1
        and len(vit.blocks) >= 2
        and all(isinstance(block, Block) and isinstance(block.attn, Attention) for block in vit.blocks)
    ):
        raise ValueError("is no plain ViT with one class token, such as vit_base_patch16_224")
    vit.norm = nn.Identity()
    return vit


def load_vit(vit: VisionTransformer, path: str | os.PathLike[str]) -> None:
    """Copy a checkpoint's weights into ``vit``, all of them.

    Raises:
        ValueError: a file that is missing, unreadable or of another model; the message says which keys do not fit.
    """
    tensors = _encoder_tensors(_read(os.fspath(path)))
    own = vit.state_dict()
    needed = {key: value for key, value in tensors.items() if key in own or not key.startswith(NOT_NEEDED)}
    if faults := key_faults(needed, {key: tuple(value.shape) for key, value in own.items()}, most=5):
        raise ValueError(f"holds other weights than method.teacher.name's: {faults}")
    vit.load_state_dict({key: tensors[key] for key in own})


def _read(path: str) -> Mapping[str, Any]:
    try:
        return read_checkpoint_file(path)
    except OSError as error:
        raise ValueError(
            f"cannot be read: {error.strerror or error}; name the file of the teacher's weights, or {UNTRAINED} for "
            "a trial"
        ) from None


def _encoder_tensors(held: Mapping[str, Any]) -> dict[str, Tensor]:
    """The encoder's tensors: bare or in one of the usual containers."""
    inner = next((held[key] for key in CONTAINERS if isinstance(held.get(key), Mapping)), held)
    if any(key.startswith(PREFIX) for key in inner):
        inner = {key.removeprefix(PREFIX): value for key, value in inner.items() if key.startswith(PREFIX)}
    return {key: value for key, value in inner.items() if isinstance(value, Tensor)}


def _precision(images: Tensor, dtype: torch.dtype) -> AbstractContextManager[Any]:
    if dtype in (torch.bfloat16, torch.float16) and not images.is_meta:  # meta tensors have no autocast
        return torch.autocast(images.device.type, dtype)
    return nullcontext()
