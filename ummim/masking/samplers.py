"""Mask samplers, run in the data workers: one compiled call draws the plans of a batch.

Randomness is counter-based: draw ``i`` of a sample is a hash of (its 64-bit seed, i), and the seed is a hash of
(run seed, epoch, sample key). A plan is therefore a pure function of these, whatever the ranks and workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np
from numba import int64, uint64

from ummim.masking.compiled import compiled
from ummim.masking.furthest import furthest
from ummim.masking.plan import MaskPlan, SamplePlan
from ummim.seeds import sample_seed

_ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996


@dataclass(frozen=True)
class MaskConfig:
    """How tokens are masked.

    Attributes:
        kind: ``random`` (MAE) or ``uniform`` (UM-MAE: one visible patch in each 2x2 block).
        ratio: share of tokens that are masked; 0.75 exactly for ``uniform``.
        secondary_ratio: share of the visible tokens replaced by a shared mask token (UM-MAE).
        throwing: how thrown tokens are chosen when the throwing ratio is above 0: ``furthest`` keeps evenly
            spread tokens (PR-MIM), ``random`` is its baseline.
        ties: which of several furthest tokens is kept: a ``random`` one, or the one of the ``lowest`` id, which leans
            to the top. PR-MIM does not say.
        throw_unit: side, in tokens, of the squares that are thrown; it must divide ``unit``. On SimMIM's ViT the
            paper leaves open whether tokens (1) or units of 32 pixels (2) are thrown.
        unit: side, in tokens, of the squares that a random mask is drawn in (SimMIM: 32 pixels, 2 tokens of a ViT).
        shared_by: consecutive samples of a global batch that have one mask in common (GreenMIM); 1: each its own.
    """

    kind: Literal["random", "uniform"] = "random"
    ratio: float = 0.75
    secondary_ratio: float = 0.0
    throwing: Literal["furthest", "random"] = "furthest"
    ties: Literal["random", "lowest"] = "random"
    throw_unit: int = 1
    unit: int = 1
    shared_by: int = 1


@compiled
def below(seed: np.uint64, counter: int, bound: int) -> np.int64:
    """Draw ``counter`` of the stream ``seed``, uniform in [0, bound): SplitMix64's finaliser as the hash."""
    z = seed + uint64(counter + 1) * uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> uint64(27))) * uint64(0x94D049BB133111EB)
    z = z ^ (z >> uint64(31))
    return int64(((z >> uint64(32)) * uint64(bound)) >> uint64(32))  # of 32 random bits


@compiled
def _shuffle(values: np.ndarray, count: int, seed: np.uint64, counter: int) -> int:
    """Fisher-Yates: the first ``count`` entries become a random draw without replacement. Returns the counter."""
    for i in range(count):
        j = i + below(seed, counter + i, values.shape[0] - i)
        values[i], values[j] = values[j], values[i]
    return counter + count


@compiled
def _fill(tokens: np.ndarray, square: int, across: int, side: int) -> None:
    """Set the (h * w,) tokens of a square to True; squares have ``side`` tokens a side, ``across`` of them a row."""
    width = across * side
    corner = square // across * side * width + square % across * side
    for row in range(side):
        for token in range(corner + row * width, corner + row * width + side):  # a slice costs more than its tokens
            tokens[token] = True


@compiled
def _draw(
    seed: np.uint64, height: int, width: int, uniform: bool, unit: int, visible_count: int, hidden_count: int,
    thrown_count: int, throw_unit: int, by_distance: bool, random_ties: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    tokens = height * width
    is_visible = np.zeros(tokens, np.bool_)
    counter = 0

    if uniform:
        # UM-MAE keeps cell 0..3 of block j, dealt from a pool that holds each cell equally often and spans at
        # least twice the blocks, so a sample's four counts are more even than independent draws would be.
        pool = np.arange(4 * ((tokens + 7) // 8)) % 4
        counter = _shuffle(pool, visible_count, seed, counter)
        visible = np.empty(visible_count, np.int64)
        for j in range(visible_count):
            row = 2 * (j // (width // 2)) + pool[j] // 2
            visible[j] = row * width + 2 * (j % (width // 2)) + pool[j] % 2
        is_visible[visible] = True
    else:
        across = width // unit
        order = np.arange(tokens // unit**2)
        counter = _shuffle(order, visible_count // unit**2, seed, counter)
        for square in order[: visible_count // unit**2]:
            _fill(is_visible, square, across, unit)
        visible = np.flatnonzero(is_visible)

    secondary = np.zeros(visible_count, np.bool_)
    if hidden_count:
        order = np.arange(visible_count)
        counter = _shuffle(order, hidden_count, seed, counter)
        secondary[order[:hidden_count]] = True

    masked = np.flatnonzero(~is_visible)
    if thrown_count == 0:
        return visible, secondary, masked, masked[:0]
    across, squares = width // throw_unit, masked.copy()
    if throw_unit > 1:
        corners = masked[(masked // width % throw_unit == 0) & (masked % width % throw_unit == 0)]
        squares = corners // width // throw_unit * across + corners % width // throw_unit  # ids on their own grid
    keep = squares.shape[0] - thrown_count // throw_unit**2
    if by_distance:
        first = 0
        if random_ties:  # ties go to the first in the list
            _shuffle(squares, squares.shape[0], seed, counter)
        else:
            first = int(below(seed, counter, squares.shape[0]))
        squares[:keep] = furthest(squares, across, keep, first)
    else:
        _shuffle(squares, keep, seed, counter)
    for square in squares[:keep]:
        _fill(is_visible, square, across, throw_unit)
    kept = masked[is_visible[masked]]
    return visible, secondary, kept, np.flatnonzero(~is_visible)


@compiled
def _draw_all(
    seeds: np.ndarray, height: int, width: int, uniform: bool, unit: int, visible_count: int, hidden_count: int,
    thrown_count: int, throw_unit: int, by_distance: bool, random_ties: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """The plans of (B,) seeds, a row each: a call and its arrays cost more than a plan."""
    count = seeds.shape[0]
    visible = np.empty((count, visible_count), np.int64)
    secondary = np.empty((count, visible_count), np.bool_)
    kept = np.empty((count, height * width - visible_count - thrown_count), np.int64)
    thrown = np.empty((count, thrown_count), np.int64)
    for i in range(count):
        visible[i], secondary[i], kept[i], thrown[i] = _draw(
            seeds[i], height, width, uniform, unit, visible_count, hidden_count, thrown_count, throw_unit,
            by_distance, random_ties,
        )  # fmt: skip
    return visible, secondary, kept, thrown


class PlanSampler:
    """Draws the mask plan of a sample from its 64-bit seed.

    Args:
        grid: (h, w) of the token grid.
        config: the recipe's mask section.
        throw_ratio: thrown tokens as a share of *all* h * w tokens (PR-MIM's r).

    Raises:
        ValueError: a mask that leaves no visible or no masked token, an odd grid under ``uniform``, or a
            throwing ratio that leaves no kept token, units that do not tile the grid, or thrown squares that do
            not divide the units.
    """

    def __init__(self, grid: tuple[int, int], config: MaskConfig, throw_ratio: float = 0.0) -> None:
        h, w = grid
        tokens = h * w
        self.grid, self.config = grid, config
        self.compact, self.shared = config.kind == "uniform", config.shared_by > 1
        if self.compact and (h % 2 or w % 2 or config.ratio != 0.75):
            raise ValueError(f"a uniform mask needs an even grid and ratio 0.75, not {h}x{w} and {config.ratio}")
        area = config.unit**2  # tokens
        if config.unit < 1 or h % config.unit or w % config.unit or (self.compact and config.unit > 1):
            raise ValueError(f"units of {config.unit} tokens do not tile a {config.kind} mask on the grid {h}x{w}")
        # MAE's truncation of a float product: 49 visible of 196. In units SimMIM rounds the masked ones up: 30 of 49.
        units = tokens // area
        visible = int(units * (1 - config.ratio)) if area == 1 else units - ceil(units * config.ratio)
        self.visible_count = visible * area
        square = config.throw_unit**2  # tokens
        if config.throw_unit < 1 or config.unit % config.throw_unit:
            raise ValueError(f"squares of {config.throw_unit} tokens do not divide the mask's units of {config.unit}")
        self.thrown_count = int(throw_ratio * (tokens // square) + _ROUNDING) * square
        self.kept_count = tokens - self.visible_count - self.thrown_count
        self.secondary_count = self.visible_count - int(self.visible_count * (1 - config.secondary_ratio))
        if not 0 < self.visible_count < tokens:
            raise ValueError(f"ratio {config.ratio} leaves {self.visible_count} of {tokens} tokens visible")
        if self.kept_count < 1 or throw_ratio < 0:
            raise ValueError(f"throwing ratio {throw_ratio} leaves no kept token at mask ratio {config.ratio}")
        if not 0 <= self.secondary_count < self.visible_count:
            raise ValueError(f"secondary ratio {config.secondary_ratio} leaves no visible token unreplaced")
        self._arguments = (
            h, w, self.compact, config.unit, self.visible_count, self.secondary_count, self.thrown_count,
            config.throw_unit, config.throwing == "furthest", config.ties == "random",
        )  # fmt: skip

    def __call__(self, seed: int) -> SamplePlan:
        return SamplePlan(*_draw(np.uint64(seed), *self._arguments))

    def batch(self, seeds: Sequence[int]) -> MaskPlan:
        """The plans of samples by their seeds, as ``stack`` puts them together; faster than one after the other."""
        parts = _draw_all(np.array(seeds, np.uint64), *self._arguments)
        return MaskPlan.of(parts, self.grid, self.compact, self.shared)

    def seed(self, seed: int, epoch: int, key: str, position: int) -> int:
        """64-bit seed of a sample's mask: a hash of its key or, where masks are shared, of its group's number.

        ``position`` is the sample's place in the epoch's order; groups of ``shared_by`` neighbours share.
        """
        group = position // self.config.shared_by
        return sample_seed(seed, epoch, f"mask of group {group}" if self.shared else key)

    def stack(self, samples: Sequence[SamplePlan]) -> MaskPlan:
        """Collate the plans of a batch."""
        return MaskPlan.stack(samples, self.grid, self.compact, self.shared)

    def warm_up(self) -> None:
        """Compile now, in the parent, so that forked workers start warm."""
        self.batch([0])
