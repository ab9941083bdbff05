"""The pyramid encoders computed plainly from official tensors: whole maps, one sample at a time."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.interop.official_tensors import Sizes
from tests.interop.plain_official_layers import Weights, attend, block, merge, same_window, table_bias


def um_pyramid(family: str, w: Weights, z: Sizes, image: Tensor, hidden: Tensor, second: Tensor | None) -> Tensor:
    """UM-MAE's Swin and PVT, on the compact map, or (``second`` is None) on a whole one with mask tokens."""
    pvt, side = "pvt" in family, z["img_size"] // 4
    fine = lambda mask: mask.view(side // 4, side // 4).repeat_interleave(4, 0).repeat_interleave(4, 1)  # noqa: E731
    x = w.conv("patch_embed.proj", image)
    if second is not None and w.has("vis_mask_token"):
        x = torch.where(fine(second)[..., None], w["vis_mask_token"][0, 0], x)
    x = x if pvt else w.norm("patch_embed.norm", x)
    if second is None:
        x = torch.where(fine(hidden)[..., None], w["mask_token"][0, 0], x)
    x = x + w["pos_embed"][0].view(side, side, -1) if pvt else x
    at = torch.arange(side, dtype=x.dtype)
    at = torch.stack(torch.meshgrid(at, at, indexing="ij"), dim=-1)
    if second is not None:
        tiles = fine(~hidden).view(side // 8, 2, 4, side // 8, 2, 4, 1)
        x, at = ((y.view(side // 8, 2, 4, side // 8, 2, 4, -1) * tiles).sum((1, 4)).flatten(2, 3).flatten(0, 1)
                 .view(side // 2, side // 2, -1) for y in (x, at))  # fmt: skip
    number = 0
    for s in range(4):
        for i in range(z["depth"][s]):
            b = w.at(f"blocks.{number}.")
            if s and i == 0:
                x = x if pvt else b.norm("downsample.norm", x)
                x, at = b.conv("downsample.proj", x.permute(2, 0, 1)), at[::2, ::2] / 2
            n = len(x)
            if pvt:
                x = pooled_block(b, x, z["num_heads"][s], z["sr_ratios"][s])
            else:
                size = min(z["window_size"], n)
                shift = size // 2 if i % 2 and size < n else 0
                place = at.flatten(0, 1)
                apart = place[None, :] - place[:, None]  # key minus query
                bias = b.linear("attn.posmlp.0", apart.sign() * apart.abs().log1p()).relu()
                bias = b.linear("attn.posmlp.2", bias).permute(2, 0, 1) + same_window(n, size, shift)
                x = block(b, x.flatten(0, 1), z["num_heads"][s], bias, 1e-5).view(n, n, -1)
            number += 1
    return w.norm("norm", x)


def pooled_block(w: Weights, x: Tensor, heads: int, ratio: int) -> Tensor:
    """(H, W, C) -> (H, W, C)."""
    y = w.norm("norm1", x, 1e-5)
    few = F.avg_pool2d(y.permute(2, 0, 1), ratio).flatten(1).T
    k, v = w.linear("attn.kv", w.norm("attn.norm", w.linear("attn.sr", few), 1e-5)).chunk(2, dim=1)
    y = attend(w.linear("attn.q", y.flatten(0, 1)), k, v, heads)
    x = x + w.linear("attn.proj", y).view(x.shape)
    return x + w.mlp("mlp", w.norm("norm2", x, 1e-5))


def sparse_swin(w: Weights, z: Sizes, image: Tensor, hidden: Tensor, row_major: bool, legacy: bool) -> list[Tensor]:
    """GreenMIM's and LocalMIM's Swin: the map (H, W, C) behind each stage and its merge. Masked tokens are computed
    along, and nobody attends to them.
    """
    x = w.norm("patch_embed.norm", w.conv("patch_embed.proj", image))
    units, maps = z["img_size"] // 32, []
    for s in range(4):
        n, unit = len(x), 8 // 2**s
        size = min(z["window_size"], n)
        cell = torch.arange(n * n)
        row, col = cell // n, cell % n
        if legacy and s:  # the number of the token, counted unit by unit, taken for its cell
            cell = (row // unit * units + col // unit) * unit**2 + row % unit * unit + col % unit
            row, col = cell // n, cell % n
        seen = (~hidden).view(units, units).repeat_interleave(unit, 0).repeat_interleave(unit, 1).flatten()
        index = (row[:, None] - row + size - 1) * (2 * size - 1) + col[:, None] - col + size - 1
        for i in range(z["depth"][s]):
            b = w.at(f"layers.{s}.blocks.{i}.")
            shift = size // 2 if i % 2 and size < n else 0
            window = (row + (size - shift) % size) // size * 1000 + (col + (size - shift) % size) // size
            apart = (window[:, None] != window) | ~seen
            apart &= ~torch.eye(n * n, dtype=torch.bool)  # so that a masked token has something to attend to
            bias = table_bias(b["attn.relative_position_bias_table"], index).masked_fill(apart, float("-inf"))
            x = block(b, x.flatten(0, 1), z["num_heads"][s], bias).view(n, n, -1)
        x = merge(w.at(f"layers.{s}.downsample."), x, row_major, 1e-6) if s < 3 else x
        maps.append(x)
    return maps


def table_swin(e: Weights, z: Sizes, image: Tensor, hidden: Tensor) -> Tensor:
    """(H / 32, W / 32, 8C)."""
    x = e.norm("patch_embed.norm", e.conv("patch_embed.proj", image), 1e-5)
    units = hidden.view(z["img_size"] // 32, -1).repeat_interleave(8, 0).repeat_interleave(8, 1)
    x = torch.where(units[..., None], e["mask_token"][0, 0], x)
    for s in range(4):
        n = len(x)
        size = min(z["window_size"], n)
        row, col = torch.arange(n * n) // n, torch.arange(n * n) % n
        for i in range(z["depth"][s]):
            b = e.at(f"layers.{s}.blocks.{i}.")
            shift = size // 2 if i % 2 and size < n else 0
            r, c = ((place - shift) % n % size for place in (row, col))  # inside the window
            index = (r[:, None] - r + size - 1) * (2 * size - 1) + c[:, None] - c + size - 1
            bias = table_bias(b["attn.relative_position_bias_table"], index) + same_window(n, size, shift)
            x = block(b, x.flatten(0, 1), z["num_heads"][s], bias, 1e-5).view(n, n, -1)
        x = merge(e.at(f"layers.{s}.downsample."), x, False, 1e-5) if s < 3 else x
    return x
