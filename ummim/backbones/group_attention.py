"""Window attention among scattered tokens: ragged windows are packed into groups of one size.

Under a random mask a window holds any number of visible tokens. Windows are packed into groups of at most G tokens;
each group attends within itself, with minus infinity between tokens of different windows. The result is that of
attention within each window, whatever the packing.

Source: GreenMIM ("Green Hierarchical Vision Transformer for Masked Image Modeling", Huang et al., NeurIPS 2022),
section 3.3. The paper searches for the cheapest G, as here; the official code takes the fullest window's size.
Packing runs on the host: it depends on the mask alone.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from ummim.nn.attention import biased_attention

CACHED = 64  # groupings kept: a forward of four stages needs at most eight


class Grouping(NamedTuple):
    """The groups of a set of tokens.

    Attributes:
        order: (g * G,) int32, the token at each place of the g groups; 0 at the places left over. None: the tokens
            are one group as they stand.
        place: (N,) int32, the place of each token; None likewise.
        bias_index: (g, G, G) int32, the row of the bias table for each query and key; one past the last row for
            tokens of different windows.
    """

    order: np.ndarray | None
    place: np.ndarray | None
    bias_index: np.ndarray


class Groups(NamedTuple):
    """A :class:`Grouping` on the model's device."""

    order: Tensor | None
    place: Tensor | None
    bias_index: Tensor


def fullest_subset(sizes: list[int], capacity: int) -> list[int]:
    """Positions of the windows with the largest total of at most ``capacity``, ascending (0/1 knapsack).

    Among equal totals, a later window is taken only where the earlier ones cannot reach the total.
    """
    fits = (1 << (capacity + 1)) - 1
    reach = [1]  # bit c of reach[i]: the first i windows have a subset of c tokens
    for size in sizes:
        reach.append((reach[-1] | reach[-1] << size) & fits)
    total = reach[-1].bit_length() - 1
    taken = []
    for i in range(len(sizes) - 1, -1, -1):
        if not reach[i] >> total & 1:
            taken.append(i)
            total -= sizes[i]
    return taken[::-1]


def pack(sizes: list[int], capacity: int) -> list[list[int]]:
    """Groups of windows, each filled as far as the remaining windows can.

    Raises:
        ValueError: a window larger than ``capacity``.
    """
    if max(sizes) > capacity:
        raise ValueError(f"a window of {max(sizes)} tokens does not fit a group of {capacity}")
    groups = []
    remaining = list(range(len(sizes)))
    while remaining:
        taken = fullest_subset([sizes[i] for i in remaining], capacity)
        groups.append([remaining[i] for i in taken])
        remaining = [window for i, window in enumerate(remaining) if i not in set(taken)]
    return groups


def cheapest_groups(sizes: list[int]) -> tuple[list[list[int]], int]:
    """The packing of least cost g * G**2 over all group sizes G, and its G; the smallest of equals.

    That is the cost of the attention maps. Linear layers run outside the groups, on no padding.
    """
    tokens, size = sum(sizes), max(sizes)
    best, best_size = pack(sizes, size), size
    while tokens * (size + 1) < len(best) * best_size**2:  # g >= tokens / G, so larger groups cannot be cheaper
        size += 1
        groups = pack(sizes, size)
        if len(groups) * size**2 < len(best) * best_size**2:
            best, best_size = groups, size
    return best, best_size


def group_tokens(rows: np.ndarray, cols: np.ndarray, window: int, shift: int) -> Grouping:
    """Group tokens by window.

    Args:
        rows: (N,) int row of each token on its stage's grid.
        cols: (N,) int column.
        window: side of a window, in tokens.
        shift: windows start at ``shift - window``, as Swin's cyclic shift with its mask has it.

    Few tokens, at most two full windows, form one group.
    """
    start = (window - shift) % window
    down, right = (rows + start) // window, (cols + start) // window
    _, window_of, sizes = np.unique(down * (right.max() + 1) + right, return_inverse=True, return_counts=True)
    if len(rows) <= 2 * window**2:
        token = np.arange(len(rows))[None]  # (1, N)
        return Grouping(None, None, _bias_index(rows[token], cols[token], window_of[token], window))

    groups, size = cheapest_groups(sizes.tolist())
    members = np.split(np.argsort(window_of, kind="stable"), np.cumsum(sizes)[:-1])  # tokens of each window
    token = np.full((len(groups), size), -1)
    for g, windows in enumerate(groups):
        packed = np.concatenate([members[i] for i in windows])
        token[g, : len(packed)] = packed
    filled = token >= 0
    place = np.empty(len(rows), np.int32)
    place[token[filled]] = np.flatnonzero(filled)
    group_windows = np.where(filled, window_of[token], -1)  # places left over see each other only
    order = np.where(filled, token, 0)
    bias_index = _bias_index(rows[order], cols[order], group_windows, window)
    return Grouping(order.reshape(-1).astype(np.int32), place, bias_index)


def _bias_index(rows: np.ndarray, cols: np.ndarray, windows: np.ndarray, window: int) -> np.ndarray:
    """(g, G) rows, columns and windows -> (g, G, G): query minus key, row-major in the bias table."""
    span = 2 * window - 1  # (rows - rows' + window - 1) * span + (cols - cols' + window - 1), in one subtraction
    flat = (rows * span + cols).astype(np.int32)
    index = flat[:, :, None] - flat[:, None, :] + np.int32((window - 1) * (span + 1))
    apart = windows.astype(np.int32)[:, :, None] != windows.astype(np.int32)[:, None, :]
    index[apart] = span**2
    return index


@lru_cache(maxsize=CACHED)
def unit_groups(
    units: tuple[int, ...], grid: tuple[int, int], side: int, window: int, shift: int, legacy: bool
) -> Grouping:
    """The groups of the tokens of some units, as :func:`unit_cells` orders them."""
    cells = unit_cells(units, grid, side)
    width = grid[1] * side
    if legacy:  # the position in window-major order of all units, read as a raster position
        cells = (np.array(units)[:, None] * side**2 + np.arange(side**2)).reshape(-1)
    return group_tokens(cells // width, cells % width, window, shift)


def unit_cells(units: tuple[int, ...], grid: tuple[int, int], side: int) -> np.ndarray:
    """(V * side**2,) int64 raster cells of the units' tokens: unit by unit, row-major inside.

    Args:
        units: ids on the ``grid`` of units.
        grid: (h, w) in units.
        side: side of a unit, in tokens.
    """
    width = grid[1] * side
    corner = np.array(units) // grid[1] * side * width + np.array(units) % grid[1] * side  # (V,)
    inner = np.arange(side)[:, None] * width + np.arange(side)  # (side, side)
    return (corner[:, None, None] + inner).reshape(-1)


class GroupAttention(nn.Module):
    """Multi-head attention with a relative position bias, within the windows of grouped tokens.

    Names and shapes of the parameters are Swin's.
    """

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias(self, index: Tensor) -> Tensor:
        """(g, G, G) -> (1, heads * g, G, G): the same for every sample."""
        table = self.relative_position_bias_table
        padded = torch.cat([table, table.new_full((1, self.num_heads), float("-inf"))])
        return F.embedding(index, padded).permute(3, 0, 1, 2).contiguous().flatten(0, 1)[None]

    def forward(self, x: Tensor, order: Tensor | None, place: Tensor | None, bias_index: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C); the other arguments are those of :class:`Groups`."""
        b, n, c = x.shape
        groups, size, _ = bias_index.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, heads, N, d)
        if order is not None:
            qkv = qkv.index_select(3, order)  # (3, B, heads, g * G, d)
        q, k, v = qkv.reshape(3, b, self.num_heads * groups, size, -1)
        x = biased_attention(q, k, v, self.bias(bias_index))  # (B, heads * g, G, d)
        x = x.reshape(b, self.num_heads, groups * size, -1).transpose(1, 2)  # (B, g * G, heads, d)
        if place is not None:
            x = x.index_select(1, place)
        return self.proj(x.reshape(b, n, c))
