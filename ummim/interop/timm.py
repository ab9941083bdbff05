"""Encoders as timm models: safetensors that ``timm.create_model`` loads with ``strict=True``."""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ummim.backbones.relative_vit import RelativeViT
from ummim.backbones.sparse_swin import SparseSwin
from ummim.backbones.table_swin import UNIT, TableSwin
from ummim.backbones.vit import ViT
from ummim.errors import UserError
from ummim.methods.api import Method

# timm's plain ViTs by (patch_size, embed_dim, depth, num_heads); all have mlp_ratio 4 and LayerNorm eps 1e-6.
TIMM_VITS = {
    (16, 192, 12, 3): "vit_tiny_patch16_224",
    (32, 384, 12, 6): "vit_small_patch32_224",
    (16, 384, 12, 6): "vit_small_patch16_224",
    (8, 384, 12, 6): "vit_small_patch8_224",
    (32, 768, 12, 12): "vit_base_patch32_224",
    (16, 768, 12, 12): "vit_base_patch16_224",
    (8, 768, 12, 12): "vit_base_patch8_224",
    (32, 1024, 24, 16): "vit_large_patch32_224",
    (16, 1024, 24, 16): "vit_large_patch16_224",
    (14, 1024, 24, 16): "vit_large_patch14_224",
    (14, 1280, 32, 16): "vit_huge_patch14_224",
}


# timm's BEiTs, likewise, and its Swins by (embed_dim, depths, num_heads); window 7, mlp_ratio 4, eps 1e-5.
TIMM_BEITS = {
    (16, 768, 12, 12): "beit_base_patch16_224",
    (16, 1024, 24, 16): "beit_large_patch16_224",
}
TIMM_SWINS = {
    (96, (2, 2, 6, 2), (3, 6, 12, 24)): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2), (3, 6, 12, 24)): "swin_small_patch4_window7_224",
    (128, (2, 2, 18, 2), (4, 8, 16, 32)): "swin_base_patch4_window7_224",
    (192, (2, 2, 18, 2), (6, 12, 24, 48)): "swin_large_patch4_window7_224",
}
TOKENS = ("mask_token", "vis_mask_token")  # of pre-training only


def export_timm(model: nn.Module) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """An encoder's tensors as timm names them, and the timm model that takes them.

    ViTs become timm's ViTs, SimMIM's ViT a BEiT with one shared position table (AMT's: with a position embedding), and
    Swins timm's Swins. A Swin exported at one window fits another after timm's own resizing: pass the tensors through
    ``timm.models.swin_transformer.checkpoint_filter_fn(tensors, model)``.

    Args:
        model: an encoder, or a method, of which the backbone is taken.

    Returns:
        (tensors, name, kwargs): ``timm.create_model(name, **kwargs)`` loads the tensors with ``strict=True``,
        and its ``forward_features`` equals the encoder's output on whole images. The norms of GreenMIM's and
        LocalMIM's Swin have eps 1e-6, which no JSON can say: add ``norm_layer=partial(nn.LayerNorm, eps=1e-6)``
        for equal features. Like ``state_dict``, the tensors share memory with the model, but for the merges of a
        Swin that joins 2x2 tokens row by row: those are put into timm's order.

    Raises:
        UserError: an encoder that timm has no counterpart of.
    """
    encoder = model.backbone() if isinstance(model, Method) else model
    tensors = {name: tensor for name, tensor in encoder.state_dict().items() if name not in TOKENS}
    if isinstance(encoder, ViT):
        name, kwargs = _vit(encoder, TIMM_VITS)
        if isinstance(encoder.norm, nn.Identity):
            kwargs["final_norm"] = False
        return tensors, name, kwargs
    if isinstance(encoder, RelativeViT):
        name, kwargs = _vit(encoder, TIMM_BEITS)
        kwargs |= {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": encoder.config.relative_position}
        if encoder.config.absolute_position:
            kwargs["use_abs_pos_emb"] = True
        return tensors, name, kwargs
    if not isinstance(encoder, (TableSwin, SparseSwin)):
        raise UserError(
            f"timm has no model like this {type(encoder).__name__} (position MLPs, convolutional merges), so "
            "it cannot be exported as timm; use --format official or --format safetensors"
        )
    if isinstance(encoder.norm, nn.Identity):
        raise UserError("timm's Swin ends in a norm and this one does not; use --format official or safetensors")
    return merge_by_columns(encoder, tensors), *_swin(encoder)


def write_timm(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write :func:`export_timm`'s tensors as safetensors.

    The metadata hold ``architecture`` (timm's model name) and ``kwargs`` (JSON) for ``timm.create_model``, and
    ``norm_eps``, the eps of the norms.

    Raises:
        UserError: an encoder that timm has no counterpart of.
        OSError: the file cannot be written.
    """
    save_timm(model, *export_timm(model), path)


def save_timm(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    name: str,
    kwargs: Mapping[str, Any],
    path: str | os.PathLike[str],
) -> None:
    """Write a model's tensors under timm's names, and the timm model that takes them."""
    contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    eps = next(str(module.eps) for module in model.modules() if isinstance(module, nn.LayerNorm))
    metadata = {"format": "pt", "architecture": name, "kwargs": json.dumps(kwargs), "norm_eps": eps}
    save_file(contiguous, path, metadata)


def _vit(encoder: ViT | RelativeViT, published: dict[tuple[int, int, int, int], str]) -> tuple[str, dict[str, Any]]:
    """timm's model name and what differs from that model's own sizes."""
    config = encoder.config
    size = (config.patch_size, config.embed_dim, config.depth, config.num_heads)
    kwargs: dict[str, Any] = {"num_classes": 0, "global_pool": "token"}  # keeps the final norm, and no head
    image_size = encoder.grid[0] * config.patch_size
    if image_size != 224:
        kwargs["img_size"] = image_size
    if config.mlp_ratio != 4:
        kwargs["mlp_ratio"] = config.mlp_ratio
    if size not in published:
        names = ("patch_size", "embed_dim", "depth", "num_heads")
        kwargs.update(zip(names, size, strict=True))
    return published.get(size, published[16, 768, 12, 12]), kwargs


def _swin(encoder: TableSwin | SparseSwin) -> tuple[str, dict[str, Any]]:
    """Likewise; without a head, whatever pools the tokens has no tensors."""
    config = encoder.config
    size = (config.embed_dim, config.depths, config.num_heads)
    kwargs: dict[str, Any] = {"num_classes": 0}
    if (image_size := encoder.grid[0] * UNIT) != 224:
        kwargs["img_size"] = image_size
    if config.window_size != 7:
        kwargs["window_size"] = config.window_size
    if config.mlp_ratio != 4:
        kwargs["mlp_ratio"] = config.mlp_ratio
    if size not in TIMM_SWINS:
        kwargs.update(zip(("embed_dim", "depths", "num_heads"), size, strict=True))
    return TIMM_SWINS.get(size, "swin_base_patch4_window7_224"), kwargs


def merges_by_rows(encoder: nn.Module) -> bool:
    """Whether a Swin joins 2x2 tokens row by row, unlike timm's."""
    layers: Any = getattr(encoder, "layers", ())
    return any(getattr(layer.downsample, "row_major", False) for layer in layers)


def merge_by_columns(encoder: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Swin's tensors with the 2x2 tokens of its merges in timm's order, column by column (TL, BL, TR, BR).

    Unchanged where the encoder has that order. The turn is its own inverse.
    """
    return turn_merges(tensors) if merges_by_rows(encoder) else dict(tensors)


def turn_merges(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Swin's tensors with the merges' 2x2 tokens in column order where they were in row order, and the reverse."""
    turned = dict(tensors)
    for key, tensor in tensors.items():
        if re.fullmatch(r"layers\.\d+\.downsample\.(norm\.weight|norm\.bias|reduction\.weight)", key):
            first, second, third, fourth = tensor.chunk(4, dim=-1)
            turned[key] = torch.cat([first, third, second, fourth], dim=-1)
    return turned
