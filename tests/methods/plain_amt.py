"""AMT written plainly: one sample at a time on boolean masks, attention maps from whole attention matrices."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.plain_methods import mlp, norm_of, patches_of, vit_blocks
from tests.methods.plain_simmim import norm_pix, relative_bias


def plain_amt(model: Any, images: Tensor, masked: Tensor, thrown: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and predictions (B, N, P), zero but at masked tokens. The masks are (B, N) bool and do not overlap."""
    errors, predictions = [], []
    for image, hidden, gone in zip(images, masked, thrown, strict=True):
        reconstruct = plain_mae if hasattr(model, "decoder") else plain_simmim
        prediction = reconstruct(model, image, hidden, gone) * hidden[:, None]
        target = patches_of(image, model.patch_size)
        difference = prediction - (norm_pix(target) if model.norm_pix_loss else target)
        errors.append(difference[hidden])
        predictions.append(prediction)
    every = torch.cat(errors)
    if hasattr(model, "decoder"):
        return every.square().mean(), torch.stack(predictions)
    return every.abs().sum() / (torch.tensor(every.numel() // 3, dtype=torch.float32) + 1e-5) / 3, torch.stack(
        predictions
    )


def plain_mae(model: Any, image: Tensor, hidden: Tensor, gone: Tensor) -> Tensor:
    """(3, H, W) -> (N, P): all tokens are assembled and placed, then the thrown ones taken out."""
    encoder = model.encoder
    tokens = embed(model, image) + encoder.pos_embed[0, 1:]
    x = torch.cat([encoder.cls_token[0] + encoder.pos_embed[0, :1], tokens[~hidden & ~gone]])
    x = norm_of(vit_blocks(x, encoder.blocks), encoder.norm)
    x = F.linear(x, model.embed.weight, model.embed.bias)
    every = model.decoder.mask_token[0].expand(len(hidden), -1).clone()
    every[~hidden & ~gone] = x[1:]
    table = model.decoder.pos_embed[0]
    decoded = vit_blocks(torch.cat([x[:1] + table[:1], (every + table[1:])[~gone]]), model.decoder.blocks)
    decoded = F.linear(norm_of(decoded, model.head.norm), model.head.pred.weight, model.head.pred.bias)
    prediction = decoded.new_zeros(len(hidden), decoded.shape[1])
    prediction[~gone] = decoded[1:]
    return prediction


def plain_simmim(model: Any, image: Tensor, hidden: Tensor, gone: Tensor) -> Tensor:
    """(3, H, W) -> (N, P): mask tokens are put in, positions added, then the thrown tokens taken out."""
    encoder = model.encoder
    x = torch.where(hidden[:, None], encoder.mask_token[0], embed(model, image))
    tokens = norm_of(relative_blocks(encoder, x, ~gone)[-1], encoder.norm)[1:]
    decoded = F.linear(tokens, model.head.weight, model.head.bias)
    prediction = decoded.new_zeros(len(hidden), decoded.shape[1])
    prediction[~gone] = decoded.view(len(tokens), 3, -1).transpose(1, 2).flatten(1)
    return prediction


def plain_attention_map(model: Any, image: Tensor) -> Tensor:
    """(3, H, W) -> (h, w)."""
    encoder, last = model.encoder, model.encoder.blocks[-1]
    x = embed(model, image)
    everywhere = torch.ones(len(x), dtype=torch.bool)
    bias = torch.zeros(1 + len(x), 1 + len(x), last.attn.num_heads, dtype=x.dtype)
    if hasattr(model, "decoder"):
        x = torch.cat([encoder.cls_token[0], x]) + encoder.pos_embed[0]
        x = vit_blocks(x, encoder.blocks[:-1])
        added = last.attn.qkv.bias
    else:
        x = relative_blocks(encoder, x, everywhere)[-2]
        bias = bias_of(encoder, everywhere)
        added = torch.cat([last.attn.q_bias, torch.zeros_like(last.attn.q_bias), last.attn.v_bias])
    q, k, _ = F.linear(norm_of(x, last.norm1), last.attn.qkv.weight, added).chunk(3, dim=-1)
    width, heads = q.shape[1] // last.attn.num_heads, []
    for h in range(last.attn.num_heads):
        at = slice(h * width, (h + 1) * width)
        attention = (q[:, at] @ k[:, at].T / width**0.5 + bias[..., h]).softmax(-1)[0, 1:]
        heads.append((attention - attention.min()) / (attention.max() - attention.min()))
    return torch.stack(heads).mean(0).view(model.grid)


def embed(model: Any, image: Tensor) -> Tensor:
    """(3, H, W) -> (N, D)."""
    conv = model.encoder.patch_embed.proj
    return F.conv2d(image[None], conv.weight, conv.bias, stride=model.patch_size)[0].flatten(1).T


def bias_of(encoder: Any, stays: Tensor) -> Tensor:
    """(1 + n, 1 + n, heads) for the tokens that stay."""
    heads = encoder.blocks[0].attn.num_heads
    n = int(stays.sum())
    if encoder.rel_pos_bias is None:
        return torch.zeros(1 + n, 1 + n, heads, dtype=encoder.cls_token.dtype)
    places = [(i // encoder.grid[1], i % encoder.grid[1]) for i in range(len(stays)) if stays[i]]
    return relative_bias(encoder.rel_pos_bias.relative_position_bias_table, places, encoder.grid)


def relative_blocks(encoder: Any, x: Tensor, stays: Tensor) -> list[Tensor]:
    """(N, D) -> the (1 + n, D) sequence after none, one, ... and all blocks."""
    x = torch.cat([encoder.cls_token[0], x])
    if encoder.pos_embed is not None:
        x = x + encoder.pos_embed[0]
    x = torch.cat([x[:1], x[1:][stays]])
    bias, outputs = bias_of(encoder, stays), [x]
    for block in encoder.blocks:
        attn = block.attn
        added = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        q, k, v = F.linear(norm_of(x, block.norm1), attn.qkv.weight, added).chunk(3, dim=-1)
        width, heads = x.shape[1] // attn.num_heads, []
        for h in range(attn.num_heads):
            at = slice(h * width, (h + 1) * width)
            heads.append((q[:, at] @ k[:, at].T / width**0.5 + bias[..., h]).softmax(-1) @ v[:, at])
        x = x + block.gamma_1 * F.linear(torch.cat(heads, dim=-1), attn.proj.weight, attn.proj.bias)
        x = x + block.gamma_2 * mlp(norm_of(x, block.norm2), block.mlp)
        outputs.append(x)
    return outputs
