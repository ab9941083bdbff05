"""UM-MAE on a PVT written plainly: whole maps, boolean masks, one sample, one head and one square at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.plain_methods import compact, mlp, norm_of, reconstruct


def plain_um_mae_pvt(
    model: Any, images: Tensor, masked: Tensor, secondary: Tensor, thrown: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss, and predictions (B, N, P); the masks are (B, N) bool, one visible token in each 2x2 block."""
    h, w = model.grid
    errors, predictions = [], []
    for image, hidden, second, throw in zip(images, masked, secondary, thrown, strict=True):
        x = embed_pvt(model.encoder, image, second, model.encoder.vis_mask_token)
        x = pvt_stages(model.encoder, compact(x, ~hidden.view(h, w)))
        x = F.linear(x, model.embed.weight, model.embed.bias)  # (h/4, w/4, 4d)
        table, legacy = model.decoder.pos_embed[0], iter((~hidden).nonzero()[:, 0].tolist())
        latent, pos = torch.zeros_like(table), table.clone()
        for i in range(h // 2):
            for j in range(w // 2):  # block (i, j): its visible patch takes a quarter of the token over it
                block = [2 * i * w + 2 * j, 2 * i * w + 2 * j + 1, (2 * i + 1) * w + 2 * j, (2 * i + 1) * w + 2 * j + 1]
                (at,) = (patch for patch in block if not hidden[patch])
                latent[at] = x[i // 2, j // 2].view(-1, 2, 2)[:, i % 2, j % 2]
                place = next(legacy)
                pos[at] = table[place if model.legacy_decoder_order else at]
        masks = {"masked": hidden, "thrown": throw}
        prediction, error = reconstruct(model, image, [], latent[~hidden], pos, masks)
        errors.append(error[hidden])
        predictions.append(prediction)
    return torch.cat(errors).mean(), torch.stack(predictions)


def embed_pvt(encoder: Any, image: Tensor, hidden: Tensor | None = None, token: Tensor | None = None) -> Tensor:
    """(3, H, W) -> (4h, 4w, C): tokens, those of ``hidden`` patches replaced by ``token``, plus the position table."""
    h, w = encoder.grid
    conv = encoder.patch_embed.proj
    x = F.conv2d(image[None], conv.weight, conv.bias, stride=4)[0].permute(1, 2, 0)
    if hidden is not None and token is not None:
        tokens = hidden.view(h, w).repeat_interleave(4, 0).repeat_interleave(4, 1)
        x = torch.where(tokens[..., None], token[0, 0], x)
    return x + encoder.pos_embed[0].view(4 * h, 4 * w, -1)


def pvt_stages(encoder: Any, x: Tensor) -> Tensor:
    """(H, W, C) -> (H/8, W/8, C4)."""
    for stage, ratio in zip(encoder.stages, encoder.config.sr_ratios, strict=True):
        if stage.merge is not None:
            conv = stage.merge.proj
            x = F.conv2d(x.permute(2, 0, 1)[None], conv.weight, conv.bias, stride=2)[0].permute(1, 2, 0)
        for block in stage.blocks:
            x = x + pooled_attention(norm_of(x, block.norm1, 1e-5), block.attn, ratio)
            x = x + mlp(norm_of(x, block.norm2, 1e-5), block.mlp)
    return norm_of(x, encoder.norm)


def pooled_attention(x: Tensor, module: Any, ratio: int) -> Tensor:
    """(H, W, C) -> (H, W, C)."""
    h, w, c = x.shape
    q = F.linear(x.flatten(0, 1), module.q.weight, module.q.bias)
    squares = [
        x[top : top + ratio, left : left + ratio].mean((0, 1))
        for top in range(0, h, ratio)
        for left in range(0, w, ratio)
    ]
    pooled = norm_of(F.linear(torch.stack(squares), module.sr.weight, module.sr.bias), module.norm, 1e-5)
    k, v = F.linear(pooled, module.kv.weight, module.kv.bias).chunk(2, dim=-1)
    width = c // module.num_heads
    heads = []
    for at in (slice(n * width, (n + 1) * width) for n in range(module.num_heads)):
        heads.append((q[:, at] @ k[:, at].T / width**0.5).softmax(-1) @ v[:, at])
    return F.linear(torch.cat(heads, dim=-1), module.proj.weight, module.proj.bias).view(h, w, c)
