"""Layers computed plainly from official tensors: by name, one sample at a time, windows as masks on whole maps."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.interop.official_tensors import Sizes


class Weights:
    """Layers by name, under a prefix."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self.tensors, self.prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def has(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def at(self, name: str) -> "Weights":
        return Weights(self.tensors, self.prefix + name)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self[f"{name}.weight"].flatten(1), self[f"{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"], eps)

    def conv(self, name: str, image: Tensor) -> Tensor:
        """(C, H, W) -> (H / p, W / p, D)."""
        kernel = self[f"{name}.weight"]
        return F.conv2d(image[None], kernel, self[f"{name}.bias"], stride=kernel.shape[-1])[0].permute(1, 2, 0)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x)))


def targets(image: Tensor, patch: int, normalised: bool) -> Tensor:
    """(3, H, W) -> (N, p * p * 3)."""
    cells = image.unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1)
    return (cells - cells.mean(1, keepdim=True)) / (cells.var(1, keepdim=True) + 1e-6).sqrt() if normalised else cells


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """(n, C), (m, C), (m, C) -> (n, C); ``bias`` is (heads or 1, n, m)."""
    q, k, v = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (q, k, v))  # (heads, n, C / heads)
    logits = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    logits = logits if bias is None else logits + bias
    return (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)


def block(w: Weights, x: Tensor, heads: int, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """(n, C) -> (n, C)."""
    q, k, v = w.linear("attn.qkv", w.norm("norm1", x, eps)).chunk(3, dim=1)
    x = x + w.linear("attn.proj", attend(q, k, v, heads, bias))
    return x + w.mlp("mlp", w.norm("norm2", x, eps))


def fill(w: Weights, name: str, grid: Tensor, gone: Tensor) -> Tensor:
    """(N, d), zero at thrown tokens -> the same with those filled in by PR-MIM's convolution."""
    side = int(len(grid) ** 0.5)
    kernel = w[f"{name}.weight"]
    image = grid.T.reshape(1, -1, side, side)
    filled = F.conv2d(image, kernel, w[f"{name}.bias"], padding=kernel.shape[-1] // 2, groups=len(kernel))
    return torch.where(gone[:, None], filled[0].flatten(1).T, grid)


def decode(w: Weights, z: Sizes, x: Tensor, hidden: Tensor, gone: Tensor, legacy: Tensor | None = None) -> Tensor:
    """([1 +] V, d) embedded tokens, visible ones in raster order -> (N, d) before the last norm.

    ``legacy``: the raster place whose position each visible token gets, where it is not its own.
    """
    flat = int(len(x) > int((~hidden).sum()))  # there is a class token
    table = w["decoder_pos_embed"][0] if w.has("decoder_pos_embed") else w["pos_embed"][0]
    pos = table[flat:].clone()
    if legacy is not None:
        pos[~hidden] = table[legacy]
    tokens = w["mask_token"][0].expand(len(hidden), -1).clone()
    tokens[~hidden] = x[flat:]
    tokens = tokens + pos
    sequence = torch.cat([x[:flat] + table[:flat], tokens[~gone]])
    blocks = "decoder_blocks" if w.has("decoder_pos_embed") else "blocks"
    for i in range(z["decoder_depth"]):
        sequence = block(w.at(f"{blocks}.{i}."), sequence, z["decoder_num_heads"])
    grid = torch.zeros_like(tokens)
    grid[~gone] = sequence[flat:]
    return fill(w, "pr_dwconv", grid, gone) if w.has("pr_dwconv.weight") else grid


def same_window(side: int, w: int, shift: int) -> Tensor:
    """(n, n) for the n = side * side tokens of a map: 0 in a window, -inf outside, -100 across the seam."""
    at = torch.arange(side)
    rolled = (at - shift) % side  # a cyclic shift by ``shift`` up and left
    strip = torch.where(rolled < side - w, 0, torch.where(rolled < side - shift, 1, 2)) if shift else 0 * at
    window, region = rolled // w, strip
    window, region = ((x[:, None] * 1000 + x).flatten() for x in (window, region))
    seam = torch.where(region[:, None] == region, 0.0, -100.0).double()
    return seam.masked_fill(window[:, None] != window, float("-inf"))


def table_bias(table: Tensor, rows: Tensor) -> Tensor:
    """(rows, heads), (n, n) -> (heads, n, n); a row beyond the table is never looked at."""
    return table[rows.clamp(0, len(table) - 1)].permute(2, 0, 1)


def merge(w: Weights, x: Tensor, row_major: bool, eps: float) -> Tensor:
    """(H, W, C) -> (H / 2, W / 2, 2C)."""
    corners = [x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]]
    corners = [corners[i] for i in (0, 2, 1, 3)] if row_major else corners
    return F.linear(w.norm("norm", torch.cat(corners, dim=-1), eps), w["reduction.weight"])


def spread(mask: Tensor, side: int) -> Tensor:
    """(N,) bool on a square grid -> (side, side): repeated, or the mean of 2x2."""
    grid = mask.view(1, 1, int(len(mask) ** 0.5), -1)
    if side < grid.shape[-1]:
        return F.avg_pool2d(grid.double(), 2)[0, 0]
    return grid.repeat_interleave(side // grid.shape[2], 2).repeat_interleave(side // grid.shape[2], 3)[0, 0]
