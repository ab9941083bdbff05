"""MAE and UM-MAE written plainly: whole images, boolean masks, one sample and one window at a time.

They borrow a model's weights and share nothing else with the package: the reference for its fast path.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def norm_of(x: Tensor, norm: Any, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps)


def attention(x: Tensor, module: Any, bias: Tensor | None = None) -> Tensor:
    """(n, C) -> (n, C), a head at a time; ``bias`` is (n, n, heads)."""
    q, k, v = F.linear(x, module.qkv.weight, module.qkv.bias).chunk(3, dim=-1)
    width = x.shape[-1] // module.num_heads
    heads = []
    for h in range(module.num_heads):
        at = slice(h * width, (h + 1) * width)
        logits = q[:, at] @ k[:, at].T / width**0.5
        logits = logits if bias is None else logits + bias[..., h]
        heads.append(logits.softmax(-1) @ v[:, at])
    return F.linear(torch.cat(heads, dim=-1), module.proj.weight, module.proj.bias)


def mlp(x: Tensor, module: Any) -> Tensor:
    return F.linear(F.gelu(F.linear(x, module.fc1.weight, module.fc1.bias)), module.fc2.weight, module.fc2.bias)


def vit_blocks(x: Tensor, blocks: Any) -> Tensor:
    """(n, D) -> (n, D)."""
    for block in blocks:
        x = x + attention(norm_of(x, block.norm1), block.attn)
        x = x + mlp(norm_of(x, block.norm2), block.mlp)
    return x


def patches_of(image: Tensor, p: int) -> Tensor:
    """(3, H, W) -> (N, p * p * 3)."""
    cells = F.unfold(image[None], p, stride=p)[0]  # (3 * p * p, N), channel-major
    return cells.view(3, p * p, -1).permute(2, 1, 0).flatten(1)


def reconstruct(
    model: Any, image: Tensor, cls: list[Tensor], latent: Tensor, pos: Tensor, masks: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Decode one sample on its full grid: latent (V, d) in raster order -> predictions (N, P), squared errors."""
    masked, thrown = masks["masked"], masks["thrown"]
    h, w = model.grid
    tokens = model.decoder.mask_token[0].expand(h * w, -1).clone()
    tokens[~masked] = latent
    tokens = tokens + pos
    sequence = torch.cat([*cls, tokens[~thrown]])
    sequence = vit_blocks(sequence, model.decoder.blocks)[len(cls) :]
    grid = torch.zeros_like(tokens)
    grid[~thrown] = sequence
    if thrown.any():
        conv = model.aggregation.layer
        image_like = grid.T.reshape(1, -1, h, w)
        filled = F.conv2d(image_like, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2, groups=len(grid[0]))
        grid = torch.where(thrown[:, None], filled[0].flatten(1).T, grid)
    prediction = F.linear(norm_of(grid, model.head.norm), model.head.pred.weight, model.head.pred.bias)
    target = patches_of(image, model.patch_size)
    if model.norm_pix_loss:
        mean = target.mean(1, keepdim=True)
        variance = (target - mean).square().sum(1, keepdim=True) / (target.shape[1] - 1)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return prediction, (prediction - target).square().mean(1)


def plain_mae(model: Any, images: Tensor, masked: Tensor, thrown: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and predictions (B, N, P); ``masked`` and ``thrown`` are (B, N) bool."""
    encoder, errors, predictions = model.encoder, [], []
    for image, hidden, throw in zip(images, masked, thrown, strict=True):
        conv = encoder.patch_embed.proj
        tokens = F.conv2d(image[None], conv.weight, conv.bias, stride=model.patch_size)[0].flatten(1).T
        tokens = tokens + encoder.pos_embed[0, 1:]
        x = torch.cat([encoder.cls_token[0] + encoder.pos_embed[0, :1], tokens[~hidden]])
        x = norm_of(vit_blocks(x, encoder.blocks), encoder.norm)
        x = F.linear(x, model.embed.weight, model.embed.bias)
        table = model.decoder.pos_embed[0]
        masks = {"masked": hidden, "thrown": throw}
        prediction, error = reconstruct(model, image, [x[:1] + table[:1]], x[1:], table[1:], masks)
        errors.append(error[hidden])
        predictions.append(prediction)
    return torch.cat(errors).mean(), torch.stack(predictions)


def plain_um_mae(
    model: Any, images: Tensor, masked: Tensor, secondary: Tensor, thrown: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss, and predictions (B, N, P); the masks are (B, N) bool, one visible token in each 2x2 block."""
    h, w = model.grid
    errors, predictions = [], []
    for image, hidden, second, throw in zip(images, masked, secondary, thrown, strict=True):
        x, coordinates = embed_map(model.encoder, image, second)
        visible = (~hidden).view(h, w)
        x, coordinates = (compact(each, visible) for each in (x, coordinates))
        x = swin_stages(model.encoder, x, coordinates)  # (h/4, w/4, 8C)
        x = F.linear(x, model.embed.weight, model.embed.bias)
        d = x.shape[-1] // 4
        blocks = torch.zeros(h // 2, w // 2, d, dtype=x.dtype)
        for i in range(2):
            for j in range(2):
                blocks[i::2, j::2] = x[..., 2 * i + j :: 4]  # pixel shuffle
        latent = torch.zeros(h, w, d, dtype=x.dtype)
        latent[visible] = blocks.repeat_interleave(2, 0).repeat_interleave(2, 1)[visible]
        latent = latent.flatten(0, 1)[~hidden]  # (V, d) in raster order
        table = pos = model.decoder.pos_embed[0]
        if model.legacy_decoder_order:  # the j-th block's token gets the j-th visible position in raster order
            legacy = torch.zeros(h // 2 * (w // 2), d, dtype=x.dtype)
            legacy[:] = table[~hidden]
            at_block = legacy.view(h // 2, w // 2, d).repeat_interleave(2, 0).repeat_interleave(2, 1)
            pos = torch.where(visible[..., None], at_block, table.view(h, w, d)).flatten(0, 1)
        masks = {"masked": hidden, "thrown": throw}
        prediction, error = reconstruct(model, image, [], latent, pos, masks)
        errors.append(error[hidden])
        predictions.append(prediction)
    return torch.cat(errors).mean(), torch.stack(predictions)


def embed_map(encoder: Any, image: Tensor, secondary: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(3, H, W) -> the whole image's map (4h, 4w, C), and the (row, column) of its tokens."""
    h, w = encoder.grid
    conv = encoder.patch_embed.proj
    x = F.conv2d(image[None], conv.weight, conv.bias, stride=4)[0].permute(1, 2, 0)
    if secondary is not None:
        tokens = secondary.view(h, w).repeat_interleave(4, 0).repeat_interleave(4, 1)
        x = torch.where(tokens[..., None], encoder.vis_mask_token[0, 0], x)
    rows, cols = torch.meshgrid(torch.arange(4.0 * h), torch.arange(4.0 * w), indexing="ij")
    return norm_of(x, encoder.patch_embed.norm), torch.stack([rows, cols], dim=-1).to(x.dtype)


def compact(x: Tensor, visible: Tensor) -> Tensor:
    """(4h, 4w, C) -> (2h, 2w, C): zero what is masked, then add the four 4x4 tiles of every 8x8 tile."""
    keep = visible.repeat_interleave(4, 0).repeat_interleave(4, 1)
    h, w, c = x.shape
    return (x * keep[..., None]).view(h // 8, 2, 4, w // 8, 2, 4, c).sum((1, 4)).reshape(h // 2, w // 2, c)


def swin_stages(encoder: Any, x: Tensor, coordinates: Tensor) -> Tensor:
    """(H, W, C), (H, W, 2) -> (H/8, W/8, 8C)."""
    for stage in encoder.stages:
        if stage.merge is not None:
            x = norm_of(x, stage.merge.norm).permute(2, 0, 1)[None]
            x = F.conv2d(x, stage.merge.proj.weight, stage.merge.proj.bias, stride=2)[0].permute(1, 2, 0)
            coordinates = coordinates[::2, ::2] / 2
        side = min(encoder.config.window_size, len(x))
        for i, block in enumerate(stage.blocks):
            shift = side // 2 if i % 2 and side < len(x) else 0
            y = windows(norm_of(x, block.norm1, 1e-5), coordinates, side, shift, block.attn)
            x = x + y
            x = x + mlp(norm_of(x, block.norm2, 1e-5), block.mlp)
    return norm_of(x, encoder.norm)


def windows(x: Tensor, coordinates: Tensor, side: int, shift: int, module: Any) -> Tensor:
    """Window attention on (H, W, C): window (I, J) holds the tokens whose cyclic index falls in it."""
    h, w, _ = x.shape
    y = torch.zeros_like(x)
    for top in range(0, h, side):
        for left in range(0, w, side):
            rows = [(top + i + shift) % h for i in range(side) for _ in range(side)]
            cols = [(left + j + shift) % w for _ in range(side) for j in range(side)]
            wrapped = torch.tensor(
                [
                    [r < shift and top + side == h, c < shift and left + side == w]
                    for r, c in zip(rows, cols, strict=True)
                ]
            )
            at = coordinates[rows, cols]  # (n, 2)
            difference = at[None, :] - at[:, None]  # key minus query
            bias = module.posmlp(difference.sign() * (1 + difference.abs()).log())  # (n, n, heads)
            apart = (wrapped[None, :] != wrapped[:, None]).any(-1, keepdim=True)
            y[rows, cols] = attention(x[rows, cols], module, bias - 100.0 * apart)
    return y
