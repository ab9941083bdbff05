"""Small shared pieces: position tables, token gathers, patches, and the initialisation of the MAE family."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm(nn.LayerNorm):
    """The MAE family's, encoders and decoders alike: eps 1e-6."""

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(dim, eps=1e-6, **kwargs)


def sincos_table(dim: int, grid: tuple[int, int], cls_token: bool = False) -> Tensor:
    """(1, [1 +] h * w, dim) float32: the fixed 2-D sine-cosine position table (MAE).

    With q = dim / 4 and w_i = 10000^(-i/q), token (row, col) gets [sin(col w) | cos(col w) | sin(row w) |
    cos(row w)]: the column takes the first half. A class token's row is zero.

    Raises:
        ValueError: ``dim`` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width divisible by 4, not {dim}")
    h, w = grid
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    cols = (torch.arange(w, dtype=torch.float64)[:, None] * omega).expand(h, w, -1)  # (h, w, q)
    rows = (torch.arange(h, dtype=torch.float64)[:, None, None] * omega).expand(h, w, -1)
    table = torch.cat([cols.sin(), cols.cos(), rows.sin(), rows.cos()], dim=-1).reshape(h * w, dim)
    if cls_token:
        table = torch.cat([torch.zeros(1, dim, dtype=torch.float64), table])
    return table.float()[None]


def exact(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if that is what it is: what targets and losses are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """(B, N, C), (B, n) -> (B, n, C): the tokens at ``ids``."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


def take_patches(images: Tensor, ids: Tensor, patch: int) -> Tensor:
    """(B, C, H, W), (B, n) -> (B, n, C, p, p): the patches at ``ids``, the others are never copied."""
    b, c, height, width = images.shape
    h, w = height // patch, width // patch
    patches = images.view(b, c, h, patch, w, patch).permute(0, 2, 4, 1, 3, 5)  # (B, h, w, C, p, p), no copy
    sample = torch.arange(b, device=images.device)[:, None]
    return patches[sample, ids // w, ids % w]


def split_patches(patches: Tensor, side: int) -> Tensor:
    """(B, n, C, p, p) -> (B, n, (p / side) ** 2, C * side ** 2): each patch's squares, row-major, as vectors."""
    b, n, c, p, _ = patches.shape
    t = p // side
    return patches.view(b, n, c, t, side, t, side).permute(0, 1, 3, 5, 2, 4, 6).reshape(b, n, t * t, -1)


def finer_cells(ids: Tensor, width: int, side: int) -> Tensor:
    """(B, n) ids on a grid of some width -> (B, n * side**2) ids of their cells on the ``side`` times finer grid.

    Token by token, row-major inside each.
    """
    at = torch.arange(side, device=ids.device)
    corner = (ids // width * width * side + ids % width) * side  # (B, n)
    return (corner[:, :, None, None] + at[:, None] * width * side + at).flatten(1)


def every_token(batch: int, tokens: int, device: torch.device) -> Tensor:
    """(B, N) int64: all token ids, for a dense image."""
    return torch.arange(tokens, device=device).expand(batch, tokens)


def init_mae(module: nn.Module) -> None:
    """Xavier-uniform Linear weights with zero bias, LayerNorm 1 and 0 (MAE; qkv counts as one matrix)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class PatchConv(nn.Conv2d):
    """A p x p convolution of stride p over RGB, applied to patches that are already cut out.

    Its key and shape are a convolution's. The module that owns the weight is the one called, as ZeRO-3 needs.
    Xavier-uniform on the (out, 3 * p * p) view; the bias keeps its default (MAE).
    """

    bias: nn.Parameter

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__(3, dim, patch, stride=patch)
        nn.init.xavier_uniform_(self.weight.view(dim, -1))

    def forward(self, patches: Tensor) -> Tensor:
        """(..., 3 * p * p), channel-major pixels -> (..., D)."""
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


def eps_of(encoder: nn.Module) -> float:
    """The eps of an encoder's norms, which is one number but in UM-MAE's pyramids."""
    return next(module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm))


def set_eps(model: nn.Module, eps: float) -> None:
    """Give every norm of a model this eps."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
