"""TEC: learn from a teacher that was pre-trained already, by its features at the masked patches and by what its
class token and most attended patches attend to.

Source: "Towards Sustainable Self-supervised Learning" (Gao et al., 2022), section 3, and its official code.

    image ─┬─ visible patches ──> ViT ──> all layers ──> adaptor ─┬─> embed, mask tokens ─> decoder ─> features
           │                                                      │                        (shared)
           │                                                      └─> embed, mask tokens ─> decoder ─> queries, keys
           └─ whole image ──> frozen teacher ──> features, attention of the class token and the top patches

Under partial reconstruction (PR-MIM) thrown tokens leave both passes and are filled in after each: the attention
pass, too, needs every patch in the end, as a key of every query.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from ummim.backbones.teacher import UNTRAINED, Teacher, TeacherConfig, build_vit, load_vit
from ummim.backbones.vit import ViT, ViTConfig
from ummim.errors import RecipeError
from ummim.masking import MaskPlan
from ummim.methods.api import Method, MethodConfig, MIMOutput, check_patches, check_width
from ummim.nn.aggregation import PartialConfig, build_aggregation
from ummim.nn.decoder import DecoderConfig
from ummim.nn.layers import init_mae, take
from ummim.nn.targets import mean_squared_error, normalise_patches
from ummim.nn.two_pass_decoder import GROUP, Adaptor, AttentionHead, FeatureHead, MaskedEmbed, SharedDecoder


@dataclass(frozen=True)
class Config(MethodConfig):
    """TEC on a ViT.

    Attributes:
        encoder: the student.
        decoder: the decoder that both passes share; ViT-L's is 768 wide.
        teacher: the frozen teacher.
        attention_scale: what the student's attention logits are multiplied by: ``width`` is the encoder's width to
            the power -1/2, as in the official code, ``head`` that of one head, as in every attention.
        attention_pass: under partial reconstruction, tokens are ``thrown`` from the attention pass too, and filled
            in before queries and keys are made of them; or it decodes the ``whole`` grid. With nothing to fill them
            in (``partial.aggregation: none``) it always decodes the whole grid: each patch is a key of every query.
    """

    encoder: ViTConfig = field(default_factory=ViTConfig)
    decoder: DecoderConfig = field(default_factory=lambda: DecoderConfig(depth=2))
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    attention_scale: Literal["width", "head"] = "width"
    attention_pass: Literal["thrown", "whole"] = "thrown"

    def mask_grid(self, image_size: int) -> tuple[int, int]:
        return image_size // self.encoder.patch_size, image_size // self.encoder.patch_size

    def check_sizes(self, image_size: int) -> Iterable[tuple[str, str]]:
        encoder, teacher = self.encoder, self.teacher
        yield from check_patches(image_size, encoder.patch_size)
        yield from check_width("method.encoder", encoder.embed_dim, encoder.num_heads)
        yield from check_width("method.decoder", self.decoder.embed_dim, self.decoder.num_heads)
        if encoder.depth < 1 or encoder.depth % GROUP:
            yield "method.encoder.depth", f"layers are fused {GROUP} at a time; choose a multiple of {GROUP}"
        patches = (image_size // encoder.patch_size) ** 2
        if not 1 <= teacher.top_k <= patches:
            yield "method.teacher.top_k", f"must be between 1 and the {patches} patches of an image"
        if teacher.layers < 1:
            yield "method.teacher.layers", "must be at least 1"
        if teacher.temperature <= 0:
            yield "method.teacher.temperature", "must be above 0"
        if not teacher.checkpoint:
            yield "method.teacher.checkpoint", f"name the file of the teacher's weights, or {UNTRAINED} for a trial"

    def files(self) -> dict[str, str]:
        checkpoint = self.teacher.checkpoint
        return {} if checkpoint == UNTRAINED else {"method.teacher.checkpoint": checkpoint}

    def for_inference(self) -> "Config":
        """The same student, for the use of what it has learnt: the teacher's file is not read."""
        return replace(self, teacher=replace(self.teacher, checkpoint=UNTRAINED))

    def build(self, image_size: int, partial: PartialConfig, throwing: bool) -> "TEC":
        """The module, with the teacher's weights; on the meta device no file is read.

        Raises:
            RecipeError: a teacher that does not exist, cannot be loaded, or does not fit the student.
        """
        return TEC(image_size, self, build_teacher(self, image_size), partial, throwing)


class TEC(Method):
    """(B, 3, H, W) float images, normalised, and their mask plan -> loss and predicted features.

    Args:
        image_size: side of the images, in pixels.
        config: the sizes.
        teacher: images and the student's dtype -> ``Lesson``.
        partial: how thrown tokens are filled in.
        throwing: whether plans will hold thrown tokens.
    """

    encoder: "TokenViT"
    predicts_pixels = False
    norm_pix_loss = False

    def __init__(
        self,
        image_size: int,
        config: Config,
        teacher: nn.Module,
        partial: PartialConfig | None = None,
        throwing: bool = False,
    ) -> None:
        super().__init__()
        width, dim = config.encoder.embed_dim, config.decoder.embed_dim
        partial = partial or PartialConfig()
        self.patch_size = config.encoder.patch_size
        self.temperature = config.teacher.temperature
        self.encoder = TokenViT(image_size, config.encoder)
        self.grid = self.encoder.grid
        self.adaptor = Adaptor(width, config.encoder.depth, int(config.decoder.mlp_ratio * dim))
        self.decoder = SharedDecoder(self.grid, config.decoder)
        self.feature_embed = MaskedEmbed(width, dim)
        self.aggregation = build_aggregation(partial, throwing, self.grid, dim)
        self.feature_head = FeatureHead(dim, width)
        self.attention_embed = MaskedEmbed(width, dim)
        heads = config.encoder.num_heads
        self.throws_attention = throwing and partial.aggregation != "none" and config.attention_pass == "thrown"
        self.attention_aggregation = build_aggregation(partial, self.throws_attention, self.grid, dim)
        scale = (width if config.attention_scale == "width" else width // heads) ** -0.5
        self.attention_head = AttentionHead(dim, width, heads, scale)
        self.teacher = teacher

    def backbone(self) -> ViT:
        """The encoder as a plain ViT, whose class token is what the MLP makes of it."""
        return self.encoder.plain()

    def frozen(self) -> nn.Module:
        return self.teacher

    def blocks(self) -> list[nn.Module]:
        return [*self.encoder.blocks, *self.decoder.blocks]

    def forward(self, images: Tensor, plan: MaskPlan) -> MIMOutput:
        self.check_inputs(images, plan)
        *lower, last = self.encoder.features(images, plan, range(len(self.encoder.blocks)))  # of (B, 1 + V, D)
        latent = self.adaptor([*lower, self.encoder.norm(last)])  # (B, 1 + V, D)
        lesson = self.teacher(images, latent.dtype)
        decoded = torch.cat([plan.visible, plan.kept], dim=1)  # (B, V + K)
        everything = torch.cat([plan.visible, plan.masked], dim=1)  # (B, N)
        attended = decoded if self.throws_attention else everything  # (B, V + m)
        feature_pass, attention_pass = self.decoder(
            self.feature_embed(latent, plan.kept.shape[1]),
            decoded,
            self.attention_embed(latent, attended.shape[1] - plan.visible.shape[1]),
            attended,
        )  # (B, 1 + V + K, d), (B, 1 + V + m, d)
        _, visible, kept = feature_pass.split([1, plan.visible.shape[1], plan.kept.shape[1]], dim=1)
        tokens, ids = self.aggregation(visible, kept, plan, self.feature_head.norm)  # (B, n, d), (B, n)
        features = self.feature_head.pred(tokens)  # (B, n, D)
        sequence = self.fill_attention(attention_pass, plan)  # (B, 1 + N, d)
        logits = self.attention_head(sequence, everything, lesson.queries)  # (B, heads, 1 + k, N)
        loss = feature_loss(features, lesson.features, ids) + attention_loss(logits, lesson.attention, self.temperature)
        return MIMOutput(loss, features, ids, self.grid[0] * self.grid[1])

    def fill_attention(self, sequence: Tensor, plan: MaskPlan) -> Tensor:
        """The attention pass's class token, visible and other decoded tokens -> those of all patches, normed."""
        norm = self.attention_head.norm
        if not self.throws_attention:
            return norm(sequence)
        rest, visible, kept = sequence.split([1, plan.visible.shape[1], plan.kept.shape[1]], dim=1)
        masked, _ = self.attention_aggregation(visible, kept, plan, norm)  # (B, M, d)
        return torch.cat([norm(torch.cat([rest, visible], dim=1)), masked], dim=1)


class TokenViT(ViT):
    """A ViT whose class token passes an MLP before it enters, so that it can follow the teacher's."""

    def __init__(self, image_size: int, config: ViTConfig) -> None:
        super().__init__(image_size, config)
        dim = config.embed_dim
        self.cls_token_mlp = Mlp(dim, int(config.mlp_ratio * dim)).apply(init_mae)

    def class_token(self) -> Tensor:
        return self.cls_token_mlp(self.cls_token)

    def plain(self) -> ViT:
        """The same encoder without the MLP; the class token is the MLP's output. All else shares memory."""
        with torch.device("meta"):
            vit = ViT(self.grid[0] * self.config.patch_size, self.config)
        tensors = {**self.state_dict(), "cls_token": self.class_token().detach()}
        vit.load_state_dict({key: tensors[key] for key in vit.state_dict()}, assign=True)
        return vit


def feature_loss(predicted: Tensor, features: Tensor, ids: Tensor) -> Tensor:
    """Scalar: squared error of (B, n, D) at ``ids`` (B, n), averaged over channels and tokens.

    The target (B, N, D) is standardised for each sample and channel over all N patches, visible ones included.
    """
    target = normalise_patches(features.transpose(1, 2))[0].transpose(1, 2)
    return mean_squared_error(predicted, take(target, ids))


def attention_loss(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Scalar: cross-entropy of logits to softened target logits over the last dimension, averaged over all others."""
    return -((target / temperature).softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def build_teacher(config: Config, image_size: int) -> Teacher:
    """The teacher of a recipe; see ``Config.build``."""
    teacher, encoder = config.teacher, config.encoder
    try:
        vit = build_vit(teacher.name, image_size)
    except ValueError as error:
        raise _fault("name", teacher.name, str(error)) from None
    last: Any = vit.blocks[-1]
    heads, grid = last.attn.num_heads, config.mask_grid(image_size)
    if (vit.embed_dim, heads, vit.patch_embed.grid_size) != (encoder.embed_dim, encoder.num_heads, grid):
        raise _fault(
            "name",
            teacher.name,
            f"has width {vit.embed_dim}, {heads} heads and a grid of {vit.patch_embed.grid_size}; the encoder it "
            f"teaches has {encoder.embed_dim}, {encoder.num_heads} and {grid}: choose one that fits the other",
        )
    if teacher.layers > len(vit.blocks):
        raise _fault("layers", teacher.layers, f"{teacher.name} has only {len(vit.blocks)} blocks; average fewer")
    if teacher.checkpoint != UNTRAINED and not next(vit.parameters()).is_meta:
        try:
            load_vit(vit, teacher.checkpoint)
        except ValueError as error:
            raise _fault("checkpoint", teacher.checkpoint, str(error)) from None
    return Teacher(vit, teacher.layers, teacher.top_k)


def _fault(key: str, value: object, problem: str) -> RecipeError:
    """Teachers are built after the recipe was read, so the message itself names key and value."""
    return RecipeError(f"method.teacher.{key} = {value!r}: {problem}", key=f"method.teacher.{key}")
