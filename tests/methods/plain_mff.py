"""MFF written plainly: whole images, boolean masks, one sample and one layer at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.plain_methods import norm_of, reconstruct, vit_blocks


def plain_mff(model: Any, images: Tensor, masked: Tensor, thrown: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and predictions (B, N, P); ``masked`` and ``thrown`` are (B, N) bool."""
    encoder, fusion, errors, predictions = model.encoder, model.fusion, [], []
    for image, hidden, throw in zip(images, masked, thrown, strict=True):
        conv = encoder.patch_embed.proj
        tokens = F.conv2d(image[None], conv.weight, conv.bias, stride=model.patch_size)[0].flatten(1).T
        tokens = tokens + encoder.pos_embed[0, 1:]
        x = torch.cat([encoder.cls_token[0] + encoder.pos_embed[0, :1], tokens[~hidden]])
        weights = fusion.proj_weights.flatten().exp()
        weights = weights / weights.sum()
        fused = torch.zeros_like(x)
        for i, block in enumerate(encoder.blocks):
            x = vit_blocks(x, [block])
            if i == model.taps[-1]:
                fused = fused + weights[-1] * x
            elif i in model.taps:
                k = model.taps.index(i)
                linear = fusion.proj_layers[k]
                fused = fused + weights[k] * F.linear(x, linear.weight, linear.bias)
        x = F.linear(norm_of(fused, encoder.norm), model.embed.weight, model.embed.bias)
        table = model.decoder.pos_embed[0]
        masks = {"masked": hidden, "thrown": throw}
        prediction, error = reconstruct(model, image, [x[:1] + table[:1]], x[1:], table[1:], masks)
        errors.append(error[hidden])
        predictions.append(prediction)
    return torch.cat(errors).mean(), torch.stack(predictions)
