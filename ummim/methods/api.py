"""What a method is: a config that builds a module, and the module's output.

A method file defines ``Config(MethodConfig)`` and a ``Method`` that composes an encoder, a decoder, an aggregation,
a head and a loss, and maps (images, plan) to :class:`MIMOutput`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from ummim.errors import RecipeError
from ummim.masking import MaskConfig, MaskPlan
from ummim.nn.aggregation import PartialConfig


class MIMOutput(NamedTuple):
    """A method's output on a batch."""

    loss: Tensor  # scalar, float32 or better
    pixels: Tensor  # (B, n, p * p * 3): predictions at ``ids``
    ids: Tensor  # (B, n) int64
    tokens: int  # h * w

    @property
    def prediction(self) -> Tensor:
        """(B, h * w, p * p * 3): row-major tokens, channel-last pixels; zero where nothing was predicted."""
        b, _, size = self.pixels.shape
        grid = self.pixels.new_zeros(b, self.tokens, size)
        return grid.scatter(1, self.ids[:, :, None].expand(-1, -1, size), self.pixels)


class Method(nn.Module):
    """What every method's module has.

    Attributes:
        encoder: the backbone, what a run is for and what is exported.
        grid: (h, w) of the mask grid.
        patch_size: side of a mask patch, in pixels.
        norm_pix_loss: predictions are in units of each patch's deviation.
    """

    encoder: nn.Module
    grid: tuple[int, int]
    patch_size: int
    norm_pix_loss: bool

    def blocks(self) -> list[nn.Module]:
        """The Transformer blocks, the units of activation checkpointing."""
        raise NotImplementedError

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

    mask_kinds: ClassVar[tuple[str, ...]] = ("random", "uniform")  # masks the method can train under
    secondary_masking: ClassVar[bool] = False  # has a token for secondary-masked visible patches
    partial_reconstruction: ClassVar[bool] = True  # PR-MIM applies

    def mask_grid(self, image_size: int) -> tuple[int, int]:
        """(h, w) of the token grid that masks are drawn on."""
        raise NotImplementedError

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
        method = type(self).__module__.rsplit(".", 1)[-1]
        if mask.kind not in self.mask_kinds:
            raise RecipeError(
                f"{method} cannot train under a {mask.kind} mask; use {' or '.join(self.mask_kinds)}", key="mask.kind"
            )
        if mask.secondary_ratio > 0 and not self.secondary_masking:
            raise RecipeError(
                f"{method} has no token for secondary-masked patches; set it to 0", key="mask.secondary_ratio"
            )
        if throw_ratio > 0 and not self.partial_reconstruction:
            raise RecipeError(f"{method} has no partial reconstruction (PR-MIM); set it to 0", key="throw_ratio")


def check_heads(section: str, width: int, heads: int) -> Iterable[tuple[str, str]]:
    """The complaint of an attention width that its heads do not divide, if it is one."""
    if heads < 1 or width < 1 or width % heads:
        yield f"{section}.num_heads", f"{heads} heads do not divide the width {width}; choose a divisor of it"


def check_width(section: str, width: int, heads: int) -> Iterable[tuple[str, str]]:
    """Likewise for tokens that get a 2-D sine-cosine position table, whose width is a multiple of 4."""
    if width < 4 or width % 4:
        yield f"{section}.embed_dim", f"the position table needs a positive multiple of 4, not {width}"
    yield from check_heads(section, width, heads)
