"""Tables learned for one size of image or window, at another: position embeddings and relative position biases.

Equal sizes give the very tensor back.
"""

from math import isqrt

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional as F


def resize_positions(table: Tensor, grid: tuple[int, int], class_token: bool) -> Tensor:
    """(1, [1 +] N, D) -> (1, [1 +] h * w, D): bicubic, as MAE's fine-tuning; a class token's row stays.

    Places keep their share of the image, so that no token gets a position that was never seen.
    """
    side = isqrt(table.shape[1] - class_token)
    if (side, side) == tuple(grid):
        return table
    resized = resample_abs_pos_embed(table, list(grid), [side, side], int(class_token), antialias=False)
    return resized.contiguous()


def resize_bias(table: Tensor, window: int, others: int = 0) -> Tensor:
    """((2 w - 1)**2 + others, heads) -> ((2 window - 1)**2 + others, heads): a bias of every offset in a window.

    Offsets near 0, which most pairs have, keep their meaning; those further out are stretched geometrically: the old
    offset k lies at 1 + q + ... + q**(k - 1) in the new window, the outermost at its edge, and a bicubic spline is read
    off at the new offsets. To a smaller window, the same the other way round.

    Source: SimMIM's fine-tuning, after BEiT's.

    Args:
        table: row-major by (row, column) offset; the last ``others`` rows, of a class token, stay as they are.
        window: side of the new window, in tokens.
        others: rows that belong to no offset.
    """
    offsets = isqrt(len(table) - others)
    if offsets == 2 * window - 1:
        return table
    weights = offset_weights((offsets + 1) // 2, window).to(table.device)  # (m, n)
    field = table[: offsets**2].double().view(offsets, offsets, -1)
    resized = torch.einsum("ai,bj,ijh->abh", weights, weights, field).flatten(0, 1)  # (m * m, heads)
    return torch.cat([resized.to(table.dtype), table[offsets**2 :]])


def offset_weights(old: int, new: int) -> Tensor:
    """(2 new - 1, 2 old - 1) float64: what each old offset along an axis gives to each new one."""
    if old == 1:  # one offset, 0: its value everywhere
        return torch.ones(2 * new - 1, 1, dtype=torch.float64)
    if new > old:
        return spline_weights(_both_ways(geometric_offsets(old, new)), torch.arange(1.0 - new, new).double())
    return spline_weights(torch.arange(1.0 - old, old).double(), _both_ways(geometric_offsets(new, old)))


def geometric_offsets(small: int, large: int) -> Tensor:
    """(small,) float64: where the offsets 0 to small - 1 of a small window lie in a large one.

    0, 1, 1 + q, 1 + q + q**2, ..., the last at ``large - 1``.
    """
    steps = torch.arange(small - 1, dtype=torch.float64)
    low, high = 1.0, float(large)
    for _ in range(60):
        q = (low + high) / 2
        low, high = (low, q) if (q**steps).sum() > large - 1 else (q, high)
    offsets = torch.cat([torch.zeros(1, dtype=torch.float64), (low**steps).cumsum(0)])
    return offsets * ((large - 1) / offsets[-1]) if small > 1 else offsets


def _both_ways(offsets: Tensor) -> Tensor:
    """(n,) offsets from 0 -> (2 n - 1,), those below 0 in front."""
    return torch.cat([-offsets[1:].flip(0), offsets])


def spline_weights(places: Tensor, at: Tensor) -> Tensor:
    """(n,) ascending places of values, (m,) places between them -> (m, n): the weights of each value.

    The interpolating cubic spline with not-a-knot ends, that of FITPACK; of fewer than four values, the polynomial.
    """
    degree = min(3, len(places) - 1)
    ends = degree + 1
    knots = torch.cat([places[:1].expand(ends), places[2:-2], places[-1:].expand(ends)])
    values = _basis(knots, degree, places)  # (n, n): of each basis function at each place
    return torch.linalg.solve(values, _basis(knots, degree, at), left=False)


def _basis(knots: Tensor, degree: int, at: Tensor) -> Tensor:
    """(m, n): the B-splines over the knots at each place (the recursion of Cox and de Boor)."""
    count = len(knots) - degree - 1
    at = at.clamp(knots[0], knots[-1])
    interval = torch.searchsorted(knots, at, right=True).sub(1).clamp(degree, count - 1)
    basis = F.one_hot(interval, len(knots) - 1).to(at.dtype)  # (m, intervals)
    at = at[:, None]
    for d in range(1, degree + 1):
        left, right = knots[: -d - 1], knots[d + 1 :]
        rise = (at - left) / (knots[d:-1] - left).where(knots[d:-1] > left, torch.inf)
        fall = (right - at) / (right - knots[1:-d]).where(right > knots[1:-d], torch.inf)
        basis = rise * basis[:, :-1] + fall * basis[:, 1:]
    return basis
