"""MaskPlan: which tokens of a batch are visible, masked and kept, or masked and thrown.

Ids count the token grid in row-major order. Every sample of a batch has the same counts, so all indexing is a
dense gather: no boolean indexing, no host synchronisation, static shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class SamplePlan(NamedTuple):
    """The plan of one sample, as drawn in a data worker."""

    visible: np.ndarray  # (V,) int64
    secondary: np.ndarray  # (V,) bool
    kept: np.ndarray  # (K,) int64
    thrown: np.ndarray  # (T,) int64


@dataclass(frozen=True)
class MaskPlan:
    """Token ids of a batch; ``h * w == V + K + T`` for every sample.

    Attributes:
        grid: (h, w) of the token grid.
        visible: (B, V) int64, tokens the encoder sees.
        secondary: (B, V) bool, visible tokens replaced by a shared mask token (UM-MAE's secondary masking).
        kept: (B, K) int64, masked tokens that the decoder reconstructs.
        thrown: (B, T) int64, masked tokens that only the spatial aggregation reconstructs (PR-MIM).
        compact: True if ``visible[b, j]`` lies in the j-th 2x2 block of the grid (block raster order), as in
            every uniform plan; encoders that compact the grid need it.
        shared: the visible ids, on the host, if they are the same in all samples, else None; encoders that group
            tokens once for a whole batch need it (GreenMIM).
    """

    grid: tuple[int, int]
    visible: Tensor
    secondary: Tensor
    kept: Tensor
    thrown: Tensor
    compact: bool = False
    shared: tuple[int, ...] | None = None

    @property
    def batch_size(self) -> int:
        """B."""
        return self.visible.shape[0]

    @property
    def masked(self) -> Tensor:
        """(B, K + T) int64: all masked tokens, the kept ones first."""
        return torch.cat([self.kept, self.thrown], dim=1)

    def mask(self) -> Tensor:
        """(B, h * w) bool: True where a token is masked."""
        h, w = self.grid
        mask = torch.ones(self.batch_size, h * w, dtype=torch.bool, device=self.visible.device)
        return mask.scatter(1, self.visible, False)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MaskPlan":
        """The plan with its ids on ``device``; ``shared`` ones stay on the host."""
        return self._map(lambda ids: ids.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "MaskPlan":
        """The plan in page-locked memory, from which copies to a GPU run beside it."""
        return self._map(Tensor.pin_memory)

    def _map(self, fn) -> "MaskPlan":  # type: ignore[no-untyped-def]
        return replace(
            self,
            visible=fn(self.visible),
            secondary=fn(self.secondary),
            kept=fn(self.kept),
            thrown=fn(self.thrown),
        )

    @staticmethod
    def stack(
        samples: Sequence[SamplePlan], grid: tuple[int, int], compact: bool = False, shared: bool = False
    ) -> "MaskPlan":
        """Collate the plans of a batch, all with the same counts; ``shared`` says that they are one and the same."""
        return MaskPlan.of([np.stack(ids) for ids in zip(*samples, strict=True)], grid, compact, shared)

    @staticmethod
    def of(
        parts: Sequence[np.ndarray], grid: tuple[int, int], compact: bool = False, shared: bool = False
    ) -> "MaskPlan":
        """The plan of a batch from the four parts of a ``SamplePlan``, each (B, n); see ``stack``."""
        visible, secondary, kept, thrown = (torch.from_numpy(part) for part in parts)
        host = tuple(visible[0].tolist()) if shared else None
        return MaskPlan(grid, visible, secondary, kept, thrown, compact, host)

    @staticmethod
    def from_mask(
        masked: Tensor | np.ndarray,
        secondary: Tensor | np.ndarray | None = None,
        thrown: Tensor | np.ndarray | None = None,
    ) -> "MaskPlan":
        """A plan from boolean masks, each (B, h * w) of a square grid or (B, h, w), row-major.

        ``masked`` is True at masked tokens, ``secondary`` marks visible ones, ``thrown`` marks masked ones. Ids
        come out ascending, except that a uniform mask (one visible token in each 2x2 block) lists its visible
        tokens in block raster order, with ``compact`` set. Where all samples have the same mask, ``shared`` is set.

        Raises:
            ValueError: shapes that do not fit, counts that differ between samples, a secondary token that is
                masked, or a thrown token that is visible.
        """
        mask = torch.as_tensor(masked)
        grid = _grid_of(mask)
        h, w = grid
        hidden = _flat("masked", mask, mask)
        second = _flat("secondary", torch.zeros_like(hidden) if secondary is None else secondary, mask)
        throw = _flat("thrown", torch.zeros_like(hidden) if thrown is None else thrown, mask)
        if (second & hidden).any():
            raise ValueError("secondary marks masked tokens; it may only mark visible ones")
        if (throw & ~hidden).any():
            raise ValueError("thrown marks visible tokens; it may only mark masked ones")
        _ids("secondary", second)  # equal counts only

        visible = _ids("masked", ~hidden)
        compact = False
        if h % 2 == 0 and w % 2 == 0 and visible.shape[1] == h * w // 4:
            block = (visible // w // 2) * (w // 2) + visible % w // 2  # (B, V)
            order = block.argsort(dim=1, stable=True)
            compact = bool((block.gather(1, order) == torch.arange(h * w // 4, device=block.device)).all())
            visible = visible.gather(1, order) if compact else visible
        same = mask.shape[0] > 0 and bool((hidden == hidden[:1]).all())
        return MaskPlan(
            grid,
            visible,
            second.gather(1, visible),
            _ids("masked without thrown", hidden & ~throw),
            _ids("thrown", throw),
            compact,
            tuple(visible[0].tolist()) if same else None,
        )


def _grid_of(mask: Tensor) -> tuple[int, int]:
    if mask.ndim == 3:
        return mask.shape[1], mask.shape[2]
    if mask.ndim != 2:
        raise ValueError(f"a mask is (B, h*w) or (B, h, w), not of shape {tuple(mask.shape)}")
    side = isqrt(mask.shape[1])
    if side * side != mask.shape[1]:
        raise ValueError(f"{mask.shape[1]} tokens are no square grid: give the mask as (B, h, w)")
    return side, side


def _flat(name: str, mask: Tensor | np.ndarray, like: Tensor) -> Tensor:
    mask = torch.as_tensor(mask, device=like.device)
    if mask.dtype is not torch.bool:
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"{name} must be boolean (or 0 and 1), not {mask.dtype} of other values")
        mask = mask.bool()
    if mask.numel() != like.numel() or mask.shape[0] != like.shape[0]:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, the mask {tuple(like.shape)}")
    return mask.reshape(mask.shape[0], -1)


def _ids(name: str, mask: Tensor) -> Tensor:
    """(B, n) int64 ascending ids of the True entries of (B, N)."""
    counts = mask.sum(1)
    if mask.shape[0] and not bool((counts == counts[0]).all()):
        raise ValueError(f"{name}: counts differ between samples ({sorted(set(counts.tolist()))}); they must be equal")
    return mask.nonzero()[:, 1].reshape(mask.shape[0], -1)
