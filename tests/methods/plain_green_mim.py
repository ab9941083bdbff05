"""GreenMIM written plainly: whole maps, boolean masks, one sample, one window at a time.

Masked tokens stay on the map and go through every layer; no visible token ever attends to them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.plain_methods import attention, mlp, norm_of, reconstruct


def plain_green_mim(model: Any, images: Tensor, masked: Tensor, thrown: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and predictions (B, N, P); ``masked`` and ``thrown`` are (B, N) bool on the grid of 32-pixel units."""
    errors, predictions = [], []
    for image, hidden, throw in zip(images, masked, thrown, strict=True):
        x = norm_of(plain_stages(model.encoder, image, hidden)[-1], model.encoder.norm)  # (h, w, 8C)
        x = F.linear(x, model.embed.weight, model.embed.bias).flatten(0, 1)[~hidden]
        masks = {"masked": hidden, "thrown": throw}
        prediction, error = reconstruct(model, image, [], x, model.decoder.pos_embed[0], masks)
        errors.append(error[hidden])
        predictions.append(prediction)
    return torch.cat(errors).mean(), torch.stack(predictions)


def plain_stages(encoder: Any, image: Tensor, hidden: Tensor, row_major: bool = False) -> list[Tensor]:
    """(3, H, W), (N,) bool -> the four maps (h', w', C) after each stage's merge, the last one as it is."""
    conv = encoder.patch_embed.proj
    x = F.conv2d(image[None], conv.weight, conv.bias, stride=4)[0].permute(1, 2, 0)
    x = norm_of(x, encoder.patch_embed.norm)  # (H / 4, W / 4, C)
    maps = []
    for s, layer in enumerate(encoder.layers):
        side = len(x)
        window = min(encoder.config.window_size, side)
        unit = 8 // 2**s
        visible = (~hidden).view(encoder.grid).repeat_interleave(unit, 0).repeat_interleave(unit, 1)
        where = places(encoder, side, unit if encoder.legacy_coordinates and s else None)
        for i, block in enumerate(layer.blocks):
            shift = window // 2 if i % 2 and window < side else 0
            x = x + attend(norm_of(x, block.norm1), visible, where, window, shift, block.attn)
            x = x + mlp(norm_of(x, block.norm2), block.mlp)
        if s < 3:
            x = merge(x, encoder.layers[s + 1].downsample, row_major)
        maps.append(x)
    return maps


def places(encoder: Any, side: int, unit: int | None) -> Tensor:
    """(H, W, 2) row and column of every token; with ``unit``, what LocalMIM takes for them: tokens are numbered unit
    by unit, and the number is read as a raster position."""
    where = torch.zeros(side, side, 2, dtype=torch.long)
    for row in range(side):
        for col in range(side):
            number = row * side + col
            if unit is not None:
                first = (row // unit * encoder.grid[1] + col // unit) * unit**2
                number = first + row % unit * unit + col % unit
            where[row, col] = torch.tensor([number // side, number % side])
    return where


def attend(x: Tensor, visible: Tensor, where: Tensor, window: int, shift: int, module: Any) -> Tensor:
    """(H, W, C) -> the same: visible tokens attend to the visible ones whose place is in their window."""
    y = torch.zeros_like(x)
    first = [shift - window if shift else 0, len(x)]  # windows start there and end beyond the map
    table = module.relative_position_bias_table
    for top in range(first[0], first[1], window):
        for left in range(first[0], first[1], window):
            corner = torch.tensor([top, left])
            inside = ((where >= corner) & (where < corner + window)).all(-1) & visible  # (H, W)
            at = where[inside]
            if not len(at):
                continue
            difference = at[:, None] - at[None, :] + window - 1  # query minus key
            bias = table[difference[..., 0] * (2 * window - 1) + difference[..., 1]]  # (n, n, heads)
            y[inside] = attention(x[inside], module, bias)
    return y


def merge(x: Tensor, module: Any, row_major: bool) -> Tensor:
    """(H, W, C) -> (H / 2, W / 2, 2C)."""
    corners = [x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]]  # TL, BL, TR, BR
    if row_major:
        corners = [corners[0], corners[2], corners[1], corners[3]]
    return F.linear(norm_of(torch.cat(corners, dim=-1), module.norm), module.reduction.weight)
