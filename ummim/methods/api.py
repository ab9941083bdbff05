"""What a method is: a config that builds a module, and the module's output.

A method file defines ``Config(MethodConfig)`` and a ``Method`` that composes an encoder, a decoder, an aggregation,
a head and a loss, and maps (images, plan) to :class:`MIMOutput`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ummim.backbones.table_swin import TableSwinConfig
from ummim.errors import RecipeError
from ummim.masking import AttentionMaskConfig, MaskConfig, MaskPlan
from ummim.nn.aggregation import BLOCKS, PartialConfig, SpatialAggregation


class MIMOutput(NamedTuple):
    """A method's output on a batch."""

    loss: Tensor  # scalar, float32 or better
    predicted: Tensor  # (B, n, P): predictions at ``ids``; P = p * p * 3 channel-last pixels, or features
    ids: Tensor  # (B, n) int64
    tokens: int  # h * w

    @property
    def prediction(self) -> Tensor:
        """(B, h * w, P): row-major tokens; zero where nothing was predicted."""
        b, _, size = self.predicted.shape
        grid = self.predicted.new_zeros(b, self.tokens, size)
        return grid.scatter(1, self.ids[:, :, None].expand(-1, -1, size), self.predicted)


class Method(nn.Module):
    """What every method's module has.

    Attributes:
        encoder: the backbone, what a run is for and what is exported.
        grid: (h, w) of the mask grid.
        patch_size: side of a mask patch, in pixels.
        norm_pix_loss: predictions are in units of each patch's deviation.
        predicts_pixels: predictions are pixels of the mask grid's patches, so that a figure can be drawn.
    """

    encoder: nn.Module
    grid: tuple[int, int]
    patch_size: int
    norm_pix_loss: bool
    predicts_pixels: bool = True

    def backbone(self) -> nn.Module:
        """What is exported and fine-tuned: the encoder, as a plain model of its kind."""
        return self.encoder

    def frozen(self) -> nn.Module | None:
        """What runs in every step and is never trained, its weights kept as buffers: a teacher."""
        return None

    def blocks(self) -> list[nn.Module]:
        """The blocks of encoder and decoders."""
        raise NotImplementedError

    def checkpointed(self) -> list[nn.Module]:
        """The units of activation checkpointing: ``blocks``, and the aggregations that are a whole block."""
        fillers = [module for module in self.modules() if isinstance(module, SpatialAggregation)]
        return [*self.blocks(), *(filler.layer for filler in fillers if filler.config.aggregation in BLOCKS)]

    def check_inputs(self, images: Tensor, plan: MaskPlan) -> None:
        """Raise ValueError for images or a plan of other sizes than the model's; static, so it compiles."""
        size = (self.grid[0] * self.patch_size, self.grid[1] * self.patch_size)
        if tuple(images.shape[2:]) != size or plan.grid != self.grid:
            raise ValueError(
                f"the model takes images of {size} pixels and plans of a {self.grid} grid, not "
                f"{tuple(images.shape[2:])} and {plan.grid}"
            )


@dataclass(frozen=True)
class MethodConfig:
    """Base of every method's config, the recipe's ``method`` section."""

    @property
    def mask_kinds(self) -> tuple[str, ...]:
        """Masks that the method can train under."""
        return ("random", "uniform")

    @property
    def secondary_masking(self) -> bool:
        """It has a token for secondary-masked visible patches."""
        return False

    @property
    def partial_reconstruction(self) -> bool:
        """PR-MIM applies."""
        return True

    @property
    def shared_mask(self) -> bool:
        """All samples of a micro-batch must have the same mask."""
        return False

    @property
    def attention(self) -> AttentionMaskConfig | None:
        """How the encoder's own attention masks the images, in a method where it does (AMT)."""
        return None

    @property
    def static_shapes(self) -> bool:
        """Shapes are the same for every plan, so that the method compiles to one graph."""
        return True

    def mask_grid(self, image_size: int) -> tuple[int, int]:
        """(h, w) of the token grid that masks are drawn on."""
        raise NotImplementedError

    def files(self) -> Mapping[str, str]:
        """Files that a run reads besides the shards: the recipe's key -> the path."""
        return {}

    def for_inference(self) -> "MethodConfig":
        """The same model without what only training needs, such as a teacher's file."""
        return self

    def check_sizes(self, image_size: int) -> Iterable[tuple[str, str]]:
        """(key, what is wrong and how to mend it) for sizes that do not fit each other."""
        raise NotImplementedError

    def build(self, image_size: int, partial: PartialConfig, throwing: bool) -> Method:
        """The method's module, freshly initialised; ``throwing`` if plans will hold thrown tokens."""
        raise NotImplementedError

    def check(self, image_size: int, mask: MaskConfig, throw_ratio: float) -> None:
        """Refuse a recipe that cannot run, before anything is built.

        Raises:
            RecipeError: with the recipe's key.
        """
        for key, problem in self.check_sizes(image_size):
            raise RecipeError(problem, key=key)
        for section in ("encoder", "decoder"):
            for key, problem in check_blocks(f"method.{section}", getattr(self, section, None)):
                raise RecipeError(problem, key=key)
        method = type(self).__module__.rsplit(".", 1)[-1]
        if mask.kind not in self.mask_kinds:
            raise RecipeError(
                f"{method} cannot train under a {mask.kind} mask; use {' or '.join(self.mask_kinds)}", key="mask.kind"
            )
        if mask.secondary_ratio > 0 and not self.secondary_masking:
            raise RecipeError(
                f"{method} has no token for secondary-masked patches; set it to 0", key="mask.secondary_ratio"
            )
        if self.shared_mask and mask.shared_by == 1:
            raise RecipeError(
                f"{method} computes one mask for a whole micro-batch; set it to a divisor of global_batch, such as 64",
                "mask.shared_by",
            )
        if throw_ratio > 0 and not self.partial_reconstruction:
            raise RecipeError(
                f"{method} has no partial reconstruction (PR-MIM) with this encoder; set it to 0", key="throw_ratio"
            )


def check_blocks(section: str, sizes: Any) -> Iterable[tuple[str, str]]:
    """The complaints of an encoder's or a decoder's config without blocks, with MLPs without width, or with a chance of
    drop path that is none."""
    for key, least in (("depth", 1), ("depths", 1), ("mlp_ratio", 0.01), ("mlp_ratios", 0.01)):
        value = getattr(sizes, key, least)
        if min(value if isinstance(value, tuple) else (value,)) < least:
            yield f"{section}.{key}", f"must be at least {least}"
    if not 0 <= getattr(sizes, "drop_path", 0) < 1:
        yield f"{section}.drop_path", "is a chance: choose a value in [0, 1), such as 0.1"


def check_patches(image_size: int, patch: int) -> Iterable[tuple[str, str]]:
    """The complaint of an image that a ViT's patches do not tile, if it is one."""
    if patch < 1:
        yield "method.encoder.patch_size", "must be at least 1"
    elif image_size < patch or image_size % patch:
        near = max(1, round(image_size / patch)) * patch
        yield "data.image_size", f"{image_size} pixels are no multiple of the patch size {patch}; use {near}, say"


def check_heads(section: str, width: int, heads: int) -> Iterable[tuple[str, str]]:
    """The complaint of an attention width that its heads do not divide, if it is one."""
    if heads < 1 or width < 1 or width % heads:
        yield f"{section}.num_heads", f"{heads} heads do not divide the width {width}; choose a divisor of it"


def check_swin(encoder: TableSwinConfig, image_size: int) -> Iterable[tuple[str, str]]:
    """The complaints of a Swin's windows and heads."""
    yield from encoder.check_windows(image_size)
    for stage, heads in enumerate(encoder.num_heads):
        yield from check_heads("method.encoder", encoder.embed_dim * 2**stage, heads)


def check_width(section: str, width: int, heads: int) -> Iterable[tuple[str, str]]:
    """Likewise for tokens that get a 2-D sine-cosine position table, whose width is a multiple of 4."""
    if width < 4 or width % 4:
        yield f"{section}.embed_dim", f"the position table needs a positive multiple of 4, not {width}"
    yield from check_heads(section, width, heads)
