"""UM-MAE on a ViT written plainly: whole images, boolean masks, one sample at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.plain_methods import norm_of, reconstruct, vit_blocks


def plain_um_mae_vit(
    model: Any, images: Tensor, masked: Tensor, secondary: Tensor, thrown: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss, and predictions (B, N, P); the masks are (B, N) bool."""
    encoder, errors, predictions = model.encoder, [], []
    for image, hidden, second, throw in zip(images, masked, secondary, thrown, strict=True):
        conv = encoder.patch_embed.proj
        tokens = F.conv2d(image[None], conv.weight, conv.bias, stride=model.patch_size)[0].flatten(1).T  # (N, D)
        tokens = torch.where(second[:, None], encoder.vis_mask_token[0], tokens) + encoder.pos_embed[0, 1:]
        x = torch.cat([encoder.cls_token[0] + encoder.pos_embed[0, :1], tokens[~hidden]])
        x = norm_of(vit_blocks(x, encoder.blocks), encoder.norm)
        x = F.linear(x, model.embed.weight, model.embed.bias)
        table = model.decoder.pos_embed[0]
        masks = {"masked": hidden, "thrown": throw}
        prediction, error = reconstruct(model, image, [x[:1] + table[:1]], x[1:], table[1:], masks)
        errors.append(error[hidden])
        predictions.append(prediction)
    return torch.cat(errors).mean(), torch.stack(predictions)
