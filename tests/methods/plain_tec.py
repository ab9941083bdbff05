"""TEC and its teacher written plainly: whole images, boolean masks, one sample, layer and head at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.plain_methods import mlp, norm_of, vit_blocks


def linear(x: Tensor, module: Any) -> Tensor:
    return F.linear(x, module.weight, module.bias)


def plain_lesson(teacher: Any, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(3, H, W) -> features (N, D), top patches (k,), attention logits (heads, 1 + k, N)."""
    vit = teacher.vit
    conv = vit.patch_embed.proj
    tokens = F.conv2d(image[None], conv.weight, conv.bias, stride=conv.weight.shape[-1])[0].flatten(1).T
    x = torch.cat([vit.cls_token[0], tokens]) + vit.pos_embed[0]
    outputs = []
    for block in vit.blocks:
        before = x
        x = vit_blocks(x, [block])
        outputs.append(x[1:])
    features = sum(outputs[-teacher.layers :]) / teacher.layers
    last = vit.blocks[-1]
    q, k, _ = linear(norm_of(before, last.norm1), last.attn.qkv).chunk(3, dim=-1)
    full = split_logits(q, k[1:], last.attn.num_heads, (q.shape[-1] // last.attn.num_heads) ** -0.5)
    top = full[:, 0].mean(0).sort(descending=True).indices[: teacher.top_k]
    return features, top, full[:, [0, *(1 + top).tolist()]]


def split_logits(q: Tensor, k: Tensor, heads: int, scale: float) -> Tensor:
    """(m, D), (n, D) -> (heads, m, n)."""
    width = q.shape[-1] // heads
    return torch.stack(
        [q[:, h * width : (h + 1) * width] @ k[:, h * width : (h + 1) * width].T * scale for h in range(heads)]
    )


def encode(model: Any, image: Tensor, hidden: Tensor) -> Tensor:
    """(3, H, W), (N,) bool -> (1 + V, D) adapted tokens, in raster order."""
    encoder, adaptor = model.encoder, model.adaptor
    conv = encoder.patch_embed.proj
    tokens = F.conv2d(image[None], conv.weight, conv.bias, stride=model.patch_size)[0].flatten(1).T
    cls = mlp(encoder.cls_token[0], encoder.cls_token_mlp)
    x = torch.cat([cls, (tokens + encoder.pos_embed[0, 1:])[~hidden]])
    layers = []
    for block in encoder.blocks:
        x = vit_blocks(x, [block])
        layers.append(x)
    layers[-1] = norm_of(layers[-1], encoder.norm)
    x = norm_of(torch.cat(layers, dim=-1), adaptor.norm_before, 1e-5)
    total = torch.zeros_like(layers[0])
    width = total.shape[-1]
    for g in range(len(layers) // 3):
        y = linear(x[:, 3 * g * width : 3 * (g + 1) * width], adaptor.fuse[g])
        total = total + y + mlp(y, adaptor.refine[g])
    return norm_of(total, adaptor.norm_after, 1e-5)


def decode(model: Any, embed: Any, latent: Tensor, hidden: Tensor, thrown: Tensor) -> tuple[Tensor, Tensor]:
    """One pass over everything that is not thrown: class token (1, d), and the grid (N, d), zero where thrown."""
    x = linear(latent, embed.proj)
    table = model.decoder.pos_embed[0]
    tokens = embed.mask_token[0].expand(len(hidden), -1).clone()
    tokens[~hidden] = x[1:]
    sequence = torch.cat([x[:1] + table[:1], (tokens + table[1:])[~thrown]])
    sequence = vit_blocks(sequence, model.decoder.blocks)
    grid = torch.zeros_like(tokens)
    grid[~thrown] = sequence[1:]
    return sequence[:1], grid


def fill_in(conv: Any, grid: Tensor, thrown: Tensor, h: int, w: int) -> Tensor:
    """(N, d), zero where thrown -> the same, the convolution's output there."""
    pixels = F.conv2d(
        grid.T.reshape(1, -1, h, w), conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2, groups=grid.shape[1]
    )
    return torch.where(thrown[:, None], pixels[0].flatten(1).T, grid)


def plain_tec(
    model: Any, images: Tensor, masked: Tensor, thrown: Tensor, config: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Feature loss, attention loss, features (B, N, D), attention logits (B, heads, 1 + k, N)."""
    h, w = model.grid
    encoder, predictions, logits, errors, entropies = config.encoder, [], [], [], []
    for image, hidden, throw in zip(images, masked, thrown, strict=True):
        target, top, attention = plain_lesson(model.teacher, image)
        latent = encode(model, image, hidden)
        _, grid = decode(model, model.feature_embed, latent, hidden, throw)
        if throw.any():
            grid = fill_in(model.aggregation.layer, grid, throw, h, w)
        prediction = linear(norm_of(grid, model.feature_head.norm), model.feature_head.pred)
        mean = target.mean(0)
        variance = (target - mean).square().sum(0) / (len(target) - 1)
        target = (target - mean) / (variance + 1e-6).sqrt()
        errors.append((prediction - target).square().mean(1)[hidden])
        predictions.append(prediction)

        if config.attention_pass == "whole":
            throw = torch.zeros_like(throw)
        cls, grid = decode(model, model.attention_embed, latent, hidden, throw)
        if throw.any():
            grid = fill_in(model.attention_aggregation.layer, grid, throw, h, w)
        norm, width = model.attention_head.norm, encoder.embed_dim
        cls, grid = norm_of(cls, norm), norm_of(grid, norm)
        q = linear(torch.cat([cls, grid]), model.attention_head.qk)[:, :width]
        k = linear(grid, model.attention_head.qk)[:, width:]
        scale = width if config.attention_scale == "width" else width / encoder.num_heads
        own = split_logits(q, k, encoder.num_heads, scale**-0.5)[:, [0, *(1 + top).tolist()]]
        taught = (attention / config.teacher.temperature).softmax(-1)
        entropies.append(-(taught * own.softmax(-1).log()).sum(-1).flatten())
        logits.append(own)
    return torch.cat(errors).mean(), torch.cat(entropies).mean(), torch.stack(predictions), torch.stack(logits)
