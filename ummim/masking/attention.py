"""Attention-driven masking and throwing (AMT): the more attention a token got, the likelier it is masked, then thrown.

Source: "Good Helper Is Around You: Attention-Driven Masked Image Modeling" (AMT), section 3, and its official code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from ummim.masking.compiled import compiled
from ummim.masking.plan import MaskPlan, SamplePlan
from ummim.masking.samplers import below

_LEAST = 1e-300  # in place of weight 0: behind every weight that float32 holds


@dataclass(frozen=True)
class AttentionMaskConfig:
    """How attention masks; the defaults are those of AMT on MAE.

    Attributes:
        refresh_epochs: epochs between recomputations of all attention maps; before the first one, tokens are masked
            as the recipe's ``mask`` section says.
        masked: share of all tokens that are masked and reconstructed.
        thrown: share of all tokens that are thrown: neither encoded, nor decoded, nor in the loss.
        unit: side, in tokens, of the squares that are drawn (SimMIM: 32 pixels, 2 tokens of a ViT).
        legacy_crop: weigh every crop by the map's top left 2x2 cells (three where the crop ends at the image's edge),
            wherever the crop lies, as the official code does by mistake.
    """

    refresh_epochs: int = 40
    masked: float = 0.45
    thrown: float = 0.40
    unit: int = 1
    legacy_crop: bool = False


@compiled
def weighted_order(seed: np.uint64, weights: np.ndarray) -> np.ndarray:
    """All ids 0..n-1, drawn one after the other without replacement with chances proportional to ``weights`` (n,).

    Sorting by exponential variates over the weights (Efraimidis and Spirakis, 2006) has the distribution of
    ``torch.multinomial`` without replacement. Weights of 0 come last, in a random order.
    """
    keys = np.empty(weights.shape[0])
    for i in range(weights.shape[0]):
        uniform = (below(seed, i, 1 << 32) + 0.5) / 2.0**32  # in (0, 1)
        keys[i] = -np.log(uniform) / max(weights[i], _LEAST)
    return np.argsort(keys, kind="mergesort")


class AttentionSampler:
    """Draws the mask plan of a sample from its 64-bit seed and its tokens' weights.

    Args:
        grid: (h, w) of the token grid.
        config: shares and unit.

    Raises:
        ValueError: units that do not tile the grid, or shares that leave no masked or no visible token.
    """

    def __init__(self, grid: tuple[int, int], config: AttentionMaskConfig) -> None:
        (h, w), unit = grid, config.unit
        if unit < 1 or h % unit or w % unit:
            raise ValueError(f"units of {unit} tokens do not tile the grid {h}x{w}")
        self.grid, self.unit = grid, unit
        units = h * w // unit**2
        if unit == 1:  # on MAE: 88 masked, 78 thrown and 30 visible of 196
            self._masked = int(config.masked * units)
            self._thrown = int((config.masked + config.thrown) * units) - self._masked
        else:  # on SimMIM: 22 masked, 13 thrown and 14 visible of 49 units
            self._masked, self._thrown = ceil(config.masked * units), ceil(config.thrown * units)
        self.kept_count, self.thrown_count = self._masked * unit**2, self._thrown * unit**2
        self.visible_count = h * w - self.kept_count - self.thrown_count
        if config.thrown > 0 and not self._thrown:
            raise ValueError(f"a share of {config.thrown} throws none of {h * w} tokens, choose a larger one or 0")
        if config.masked <= 0 or config.thrown < 0 or self._masked < 1 or self.visible_count < 1:
            raise ValueError(
                f"shares of {config.masked} masked and {config.thrown} thrown leave {self.kept_count} masked and "
                f"{self.visible_count} visible of {h * w} tokens"
            )

    def __call__(self, seed: int, weights: np.ndarray) -> SamplePlan:
        """The plan for ``weights`` (h, w), which are not negative; ids ascend."""
        (h, w), unit = self.grid, self.unit
        sums = weights.reshape(h // unit, unit, w // unit, unit).sum((1, 3), dtype=np.float64)  # (h / u, w / u)
        order = weighted_order(np.uint64(seed), sums.ravel())
        part = np.zeros(sums.size, np.int8)  # 0 visible, 1 masked, 2 thrown
        part[order[: self._masked]] = 1
        part[order[self._masked : self._masked + self._thrown]] = 2
        tokens = part.reshape(sums.shape).repeat(unit, 0).repeat(unit, 1).ravel()  # (h * w,)
        visible, kept, thrown = (np.flatnonzero(tokens == i) for i in range(3))
        return SamplePlan(visible, np.zeros(len(visible), np.bool_), kept, thrown)

    def stack(self, samples: Sequence[SamplePlan]) -> MaskPlan:
        """Collate the plans of a batch."""
        return MaskPlan.stack(samples, self.grid)

    def warm_up(self) -> None:
        """Compile now, in the parent, so that forked workers start warm."""
        self(0, np.ones(self.grid))
