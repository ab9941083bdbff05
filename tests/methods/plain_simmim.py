"""SimMIM written plainly: whole images, boolean masks, one sample, one head and one window at a time.

The head is the official one, a convolution and a pixel shuffle on the whole map, and the loss is taken over pixels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.plain_methods import mlp, norm_of, patches_of, swin_stages
from tests.methods.plain_um_mae_pvt import pvt_stages


def plain_simmim(model: Any, images: Tensor, masked: Tensor, thrown: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and predictions (B, N, P); the masks are (B, N) bool on the mask grid of SimMIM's ViT or Swin."""
    (h, w), p = model.grid, model.patch_size
    error, count, predictions = torch.zeros((), dtype=images.dtype), 0, []
    for image, hidden, throw in zip(images, masked, thrown, strict=True):
        if hasattr(model.encoder, "rel_pos_bias"):
            x = relative_vit(model, image, hidden, throw).view(h, w, -1)
        else:
            x = table_swin(model.encoder, image, hidden)
        weight = model.head.weight[:, :, None, None]
        decoded = F.conv2d(x.permute(2, 0, 1)[None], weight, model.head.bias)
        prediction = F.pixel_shuffle(decoded, p)[0]  # (3, H, W)
        predictions.append(patches_of(prediction, p))
        pixels = hidden.view(h, w).repeat_interleave(p, 0).repeat_interleave(p, 1)  # (H, W)
        target = image
        if model.norm_pix_loss:
            target = F.fold(norm_pix(patches_of(image, p)).view(h * w, p * p, 3).permute(2, 1, 0).flatten(0, 1)[None],
                            image.shape[1:], p, stride=p)[0]  # fmt: skip
        error = error + ((prediction - target).abs() * pixels).sum()
        count += int(pixels.sum())
    return error / (torch.tensor(count, dtype=torch.float32) + 1e-5) / 3, torch.stack(predictions)


def plain_um_simmim(model: Any, images: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Likewise for UM-MAE's Swin and PVT, whose last token covers 2x2 patches."""
    h, w = model.grid
    errors, predictions = [], []
    for image, hidden in zip(images, masked, strict=True):
        encoder = model.encoder
        x = hide(dense(encoder, image), hidden.view(h, w), 4, encoder.mask_token)
        if hasattr(encoder, "pos_embed"):
            x = pvt_stages(encoder, x + encoder.pos_embed[0].view(*x.shape[:2], -1))
        else:
            rows, cols = torch.meshgrid(torch.arange(4.0 * h), torch.arange(4.0 * w), indexing="ij")
            x = swin_stages(encoder, x, torch.stack([rows, cols], dim=-1).to(x.dtype))
        x = F.linear(x, model.head.weight, model.head.bias)  # (h/2, w/2, 4 * 768)
        prediction = torch.stack(
            [x[r // 2, c // 2].view(-1, 2, 2)[:, r % 2, c % 2] for r in range(h) for c in range(w)]
        )
        target = patches_of(image, 16)
        target = norm_pix(target) if model.norm_pix_loss else target
        errors.append((prediction - target).abs()[hidden])
        predictions.append(prediction)
    return torch.cat(errors).mean(), torch.stack(predictions)


def norm_pix(patches: Tensor) -> Tensor:
    """(N, P): each patch less its mean, by its unbiased deviation."""
    mean = patches.mean(1, keepdim=True)
    variance = (patches - mean).square().sum(1, keepdim=True) / (patches.shape[1] - 1)
    return (patches - mean) / (variance + 1e-6).sqrt()


def dense(encoder: Any, image: Tensor, eps: float = 1e-6) -> Tensor:
    """(3, H, W) -> (H/4, W/4, C): every token, normed where the encoder norms them."""
    conv = encoder.patch_embed.proj
    x = F.conv2d(image[None], conv.weight, conv.bias, stride=4)[0].permute(1, 2, 0)
    return norm_of(x, encoder.patch_embed.norm, eps) if hasattr(encoder.patch_embed.norm, "weight") else x


def hide(x: Tensor, hidden: Tensor, side: int, token: Tensor) -> Tensor:
    """(H, W, C): tokens of the patches in ``hidden`` (h, w), each ``side`` tokens wide, become ``token``."""
    return torch.where(hidden.repeat_interleave(side, 0).repeat_interleave(side, 1)[..., None], token[0, 0], x)


def biased_attention(x: Tensor, weight: Tensor, bias: Tensor, module: Any, logits: Tensor) -> Tensor:
    """(n, C) -> (n, C), a head at a time; ``logits`` (n, n, heads) are added."""
    q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
    width = x.shape[-1] // module.num_heads
    heads = []
    for h in range(module.num_heads):
        at = slice(h * width, (h + 1) * width)
        heads.append((q[:, at] @ k[:, at].T / width**0.5 + logits[..., h]).softmax(-1) @ v[:, at])
    return F.linear(torch.cat(heads, dim=-1), module.proj.weight, module.proj.bias)


def relative_vit(model: Any, image: Tensor, hidden: Tensor, thrown: Tensor) -> Tensor:
    """(3, H, W) -> (N, D), normed: thrown tokens are left out and filled in by the depth-wise convolution."""
    encoder, (h, w) = model.encoder, model.grid
    conv = encoder.patch_embed.proj
    x = F.conv2d(image[None], conv.weight, conv.bias, stride=model.patch_size)[0].flatten(1).T
    x = torch.where(hidden[:, None], encoder.mask_token[0], x)
    places = [(i // w, i % w) for i in range(h * w) if not thrown[i]]
    bias = relative_bias(encoder.rel_pos_bias.relative_position_bias_table, places, (h, w))
    x = torch.cat([encoder.cls_token[0], x[~thrown]])
    for block in encoder.blocks:
        attn = block.attn
        added = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        x = x + block.gamma_1 * biased_attention(norm_of(x, block.norm1), attn.qkv.weight, added, attn, bias)
        x = x + block.gamma_2 * mlp(norm_of(x, block.norm2), block.mlp)
    grid = x.new_zeros(h * w, x.shape[1])
    grid[~thrown] = x[1:]
    if thrown.any():
        conv = model.aggregation.layer
        filled = F.conv2d(grid.T.view(1, -1, h, w), conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2,
                          groups=grid.shape[1])  # fmt: skip
        grid = torch.where(thrown[:, None], filled[0].flatten(1).T, grid)
    return norm_of(grid, encoder.norm)


def relative_bias(table: Tensor, places: list[tuple[int, int]], grid: tuple[int, int]) -> Tensor:
    """(1 + n, 1 + n, heads): query first, the class token in front."""
    h, w = grid
    last = (2 * h - 1) * (2 * w - 1)
    rows = [[table[last + 2], *(table[last] for _ in places)]]
    for r, c in places:
        rows.append([table[last + 1], *(table[(r - s + h - 1) * (2 * w - 1) + c - d + w - 1] for s, d in places)])
    return torch.stack([torch.stack(row) for row in rows])


def table_swin(encoder: Any, image: Tensor, hidden: Tensor | None = None) -> Tensor:
    """(3, H, W) -> (H/32, W/32, 8C), normed; ``hidden`` is (N,) bool on 32-pixel units."""
    x = dense(encoder, image, 1e-5)
    if hidden is not None:
        x = hide(x, hidden.view(encoder.grid), 8, encoder.mask_token)
    for s, layer in enumerate(encoder.layers):
        if s:
            four = [x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]]
            merge = layer.downsample
            x = F.linear(norm_of(torch.cat(four, dim=-1), merge.norm, 1e-5), merge.reduction.weight)
        side = min(encoder.config.window_size, len(x))
        for i, block in enumerate(layer.blocks):
            shift = side // 2 if i % 2 and side < len(x) else 0
            x = x + table_windows(norm_of(x, block.norm1, 1e-5), side, shift, block.attn)
            x = x + mlp(norm_of(x, block.norm2, 1e-5), block.mlp)
    return norm_of(x, encoder.norm, 1e-5)


def table_windows(x: Tensor, side: int, shift: int, module: Any) -> Tensor:
    """(H, W, C) -> the same: a window holds tokens whose cyclic index falls in it; the seam is not looked across."""
    h, w, _ = x.shape
    y = torch.zeros_like(x)
    cells = [(i, j) for i in range(side) for j in range(side)]
    rows = [(i - k + side - 1) * (2 * side - 1) + j - m + side - 1 for i, j in cells for k, m in cells]
    bias = module.relative_position_bias_table[rows].view(side**2, side**2, -1)
    for top in range(0, h, side):
        for left in range(0, w, side):
            at = [((top + i + shift) % h, (left + j + shift) % w) for i, j in cells]
            wrapped = torch.tensor([[r < top, c < left] for r, c in at])
            apart = (wrapped[None, :] != wrapped[:, None]).any(-1, keepdim=True)
            r, c = zip(*at, strict=True)
            y[r, c] = biased_attention(x[r, c], module.qkv.weight, module.qkv.bias, module, bias - 100.0 * apart)
    return y
