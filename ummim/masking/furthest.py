"""Furthest sampling of masked tokens (PR-MIM): keep tokens that are spread out evenly, throw the rest."""

import numpy as np
from torch import Tensor, from_numpy

from ummim.masking.compiled import compiled


@compiled
def furthest(masked: np.ndarray, width: int, keep: int, first: int) -> np.ndarray:
    """Greedy max-min selection of ``keep`` of the ids ``masked`` (M,), in the order of selection.

    ``first`` is a position in ``masked``. Each round keeps the token with the largest Euclidean distance to its
    nearest kept one; ties go to the first in the list. Squared integer distances, below 2**31: exact, O(keep * M).
    """
    count = masked.shape[0]
    kept = np.empty(keep, np.int64)
    rows = np.empty(count, np.int32)
    cols = np.empty(count, np.int32)
    gap = np.full(count, np.int32(2**31 - 1), np.int32)  # squared distance to the nearest kept token
    for i in range(count):
        rows[i] = masked[i] // width
        cols[i] = masked[i] % width
    current = first
    for k in range(keep):
        kept[k] = masked[current]
        row, col = rows[current], cols[current]
        gap[current] = -1
        best = np.int32(-1)
        for i in range(count):  # branch-free, so that the compiler vectorises it
            dr, dc = np.int32(rows[i] - row), np.int32(cols[i] - col)
            gap[i] = min(gap[i], np.int32(dr * dr + dc * dc))
            best = max(best, gap[i])
        current = 0
        while gap[current] != best:
            current += 1
    return kept


def furthest_sample(masked: np.ndarray | Tensor, grid: tuple[int, int], keep: int, first: int) -> np.ndarray | Tensor:
    """Ids of ``keep`` masked tokens by greedy furthest-point sampling (PR-MIM, furthest sampling).

    Args:
        masked: ids of the masked tokens, (M,) integers, or a boolean mask, (h * w,) or (h, w).
        grid: (h, w) of the token grid.
        keep: how many tokens to keep.
        first: id of the token to start from, one of ``masked``.

    Returns:
        (keep,) int64 ids in the order of selection, as an array or a tensor like ``masked``. Distances are
        Euclidean between (row, column); ties go to the lowest id.

    Raises:
        ValueError: ids outside the grid or repeated, ``first`` not masked, or ``keep`` not in [1, M].
    """
    h, w = grid
    ids = masked.detach().cpu().numpy() if isinstance(masked, Tensor) else np.asarray(masked)
    if ids.dtype == np.bool_:
        if ids.size != h * w:
            raise ValueError(f"a mask of shape {ids.shape} does not fit the grid {h}x{w}")
        ids = np.flatnonzero(ids)
    elif not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"masked holds {ids.dtype} values; it takes ids (integers) or a boolean mask")
    ids = np.unique(ids_given := ids.astype(np.int64).ravel())
    if ids.size != ids_given.size:
        raise ValueError("masked holds a token twice")
    if ids.size and (ids[0] < 0 or ids[-1] >= h * w):
        raise ValueError(f"masked holds ids outside the grid {h}x{w}")
    if not 1 <= keep <= ids.size:
        raise ValueError(f"keep = {keep} is not between 1 and the {ids.size} masked tokens")
    start = int(np.searchsorted(ids, first))
    if start == ids.size or ids[start] != first:
        raise ValueError(f"first = {first} is not a masked token")
    kept = furthest(ids, w, keep, start)
    return from_numpy(kept).to(masked.device) if isinstance(masked, Tensor) else kept
