"""Attention windows of a map, and which coordinate difference each pair of tokens in a window has."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ummim.nn.attention import biased_attention

TILE = 4  # a mask patch is 4x4 first-stage tokens


@dataclass(frozen=True)
class Geometry:
    """The windows of one stage, shared by its blocks."""

    differences: Tensor  # (L, 2) float32: every distinct (row, column) difference, key minus query
    index: Tensor  # (B', nW, n, n) int32 into ``differences``, query first; B' = 1 for dense images
    mask: Tensor | None  # (nW, n, n) float32: -100 between tokens that only the cyclic shift brought together
    shift: int


def partition(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B, nW, n, C), n = window**2, windows and tokens row-major."""
    b, h, w, c = x.shape
    x = x.view(b, h // window, window, w // window, window, c)
    return x.transpose(2, 3).reshape(b, -1, window * window, c)


def merge_windows(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """(B, nW, n, C) -> (B, H, W, C): the inverse of :func:`partition`."""
    b, _, _, c = x.shape
    x = x.view(b, height // window, width // window, window, window, c)
    return x.transpose(2, 3).reshape(b, height, width, c)


def attend(qkv: Tensor, num_heads: int, bias: Tensor) -> Tensor:
    """Multi-head attention within windows.

    Args:
        qkv: (B, nW, n, 3C) queries, keys and values of the windows' tokens.
        num_heads: heads.
        bias: (1 or B, 1 or nW, heads, n, n), as few as there are: none is repeated for other samples or windows.

    Returns:
        (B, nW, n, C).
    """
    b, windows, n, _ = qkv.shape
    q, k, v = qkv.view(b, windows, n, 3, num_heads, -1).permute(3, 0, 1, 4, 2, 5)  # each (B, nW, heads, n, d)
    if bias.shape[:2] in ((1, 1), (b, windows)):  # windows count as samples
        x = biased_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias.flatten(0, 1))
    else:  # one set of windows for all samples: windows count as heads
        x = biased_attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), bias.flatten(1, 2))
    return x.reshape(b, windows, num_heads, n, -1).transpose(2, 3).reshape(b, windows, n, -1)


def shift_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(nW, n, n) float32: 0 within a region of the rolled map, -100 across regions (Swin, section 3.2)."""
    rows, cols = (_bands(size, window, shift, device) for size in (height, width))
    region = (3 * rows[:, None] + cols)[None, :, :, None]  # (1, H, W, 1)
    region = partition(region, window)[0, :, :, 0]  # (nW, n)
    return (region[:, :, None] != region[:, None, :]).float() * -100.0


def _bands(size: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(size,) 0, 1 or 2: which of Swin's three bands a row of the rolled map belongs to."""
    at = torch.arange(size, device=device)
    return (at >= size - window).long() + (at >= size - shift).long()


def window_geometry(rows: Tensor, cols: Tensor, window: int, shifted: bool, stage: int, compact: bool) -> Geometry:
    """The windows of a stage's map.

    Args:
        rows: (B', H, W) int64 true row of each token, counted in first-stage tokens of the full image.
        cols: (B', H, W) int64, likewise.
        window: window side in tokens; a map no larger becomes one window and is never shifted.
        shifted: cyclic shift by half a window.
        stage: 0 to 3; coordinates are halved at every merge, so a stage's unit is 2**stage first-stage tokens.
        compact: the map is compact, so a window reaches further in the image than its side.
    """
    _, h, w = rows.shape
    side = min(window, h)
    shift = side // 2 if shifted and h > window else 0
    unit, step = 2**stage, min(2**stage, TILE)  # true differences are multiples of ``step``
    if compact:
        # Tokens d apart on the compact axis are at most 2d + 2 TILE - 1 apart in the image.
        reach = (2 * side * unit + 2 * TILE) // step
        pairs = [_pair_differences(axis, side, shift) for axis in (rows, cols)]  # 2 x (B, nW, n, n)
    else:
        reach, step = side, unit
        pairs = [_pair_differences(axis[:1, :side, :side], side, 0) for axis in (rows, cols)]  # one window is all
    # Pairs across the cyclic seam can be further apart: they are masked, any entry will do.
    dr, dc = ((pair // step).clamp(-reach, reach) + reach for pair in pairs)
    index = (dr * (2 * reach + 1) + dc).int()
    values = torch.arange(-reach, reach + 1, device=rows.device) * (step / unit)
    mask = shift_mask(h, w, side, shift, rows.device) if shift else None
    return Geometry(torch.cartesian_prod(values, values), index, mask, shift)


def _pair_differences(axis: Tensor, window: int, shift: int) -> Tensor:
    """(B', H, W) -> (B', nW, n, n): coordinate of the key minus that of the query, in rolled windows."""
    axis = torch.roll(axis, (-shift, -shift), (1, 2)) if shift else axis
    at = partition(axis[..., None], window)[..., 0]  # (B', nW, n)
    return at[:, :, None, :] - at[:, :, :, None]
