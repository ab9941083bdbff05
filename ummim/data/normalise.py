"""Between uint8 pixels and the float32 images that models take; done on the device."""

from functools import lru_cache

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@lru_cache(maxsize=8)
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """(3, 1, 1) float32 mean and deviation; not buffers, which DeepSpeed would round to 16 bits."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8, in any layout -> float32 with ImageNet's mean and deviation, contiguous."""
    mean, std = _constants(images.device)
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    return (pixels / 255 - mean) / std


def denormalise(images: Tensor) -> Tensor:
    """The inverse, to float32 in [0, 1] where the input was an image."""
    mean, std = _constants(images.device)
    return images.float() * std + mean
