"""Reconstruction targets and losses, always in float32 or better."""

import torch
from torch import Tensor

from ummim.nn.layers import exact, take_patches


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, h * w, p * p * C): row-major tokens, channel-last pixels (MAE)."""
    b, c, height, width = images.shape
    h, w = height // patch, width // patch
    return images.view(b, c, h, patch, w, patch).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w, -1)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(B, h * w, p * p * C) -> (B, C, H, W): the inverse of :func:`patchify`."""
    b, _, size = tokens.shape
    h, w = grid
    pixels = tokens.view(b, h, w, patch, patch, size // patch**2)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h * patch, w * patch)


def normalise_patches(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(..., P) -> normalised (..., P), mean (..., 1), deviation (..., 1): MAE's norm-pix.

    Mean and variance are over all pixels and channels of one patch; the variance is unbiased, eps 1e-6.
    """
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    deviation = (variance + 1e-6).sqrt()
    return (pixels - mean) / deviation, mean, deviation


def pixel_targets(images: Tensor, ids: Tensor, patch: int, norm_pix: bool) -> Tensor:
    """(B, C, H, W), (B, n) -> (B, n, p * p * C): the target pixels of the patches at ``ids``."""
    pixels = take_patches(images, ids, patch).permute(0, 1, 3, 4, 2).flatten(2)  # (B, n, p*p*C)
    pixels = exact(pixels)
    return normalise_patches(pixels)[0] if norm_pix else pixels


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Scalar: squared error averaged over pixels, then over every token given (MAE's loss on masked tokens)."""
    return (prediction.to(target.dtype) - target).square().mean()
