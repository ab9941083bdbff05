"""Reconstruct images with a method and draw the figure, during training and from a checkpoint."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ummim.data import Batch
from ummim.data.augment import Augment
from ummim.data.images import decode
from ummim.errors import DataError
from ummim.masking import sample_seed
from ummim.methods.api import Method
from ummim.recipe import Recipe
from ummim.visualize import predicted_pixels, reconstruction_figure, save_figure

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@lru_cache(maxsize=8)
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """(3, 1, 1) float32 mean and deviation; not buffers, which DeepSpeed would round to 16 bits."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 with ImageNet's mean and deviation."""
    mean, std = _constants(images.device)
    return (images.float() / 255 - mean) / std


def denormalise(images: Tensor) -> Tensor:
    """The inverse, to float32 in [0, 1] where the input was an image."""
    mean, std = _constants(images.device)
    return images.float() * std + mean


@torch.no_grad()
def draw_reconstruction(method: Method, batch: Batch, path: Path | None, title: str = "") -> None:
    """Reconstruct ``batch``, which is on the method's device, and write the figure.

    Under ZeRO-3 every rank must call; those that only compute pass ``path=None``.
    """
    images = normalise(batch.images)
    output = method(images, batch.plan)
    if path is None:
        return
    pixels, covered = predicted_pixels(images, output, method.patch_size, method.norm_pix_loss)
    if method.norm_pix_loss:
        title += "   (norm-pix: each patch's mean and contrast are the original's)"
    save_figure(reconstruction_figure(batch.images, batch.plan, denormalise(pixels), covered, title), path)


def reconstruct_files(
    recipe: Recipe, method: Method, files: Sequence[Path], out: Path, seed: int = 0, title: str = ""
) -> None:
    """Reconstruct image files under the recipe's masks and write the figure to ``out``.

    Raises:
        DataError: a file that cannot be read or decoded.
    """
    augment, sampler, images = Augment(recipe.data), recipe.sampler(), []
    for file in files:
        try:
            images.append(augment.centre(decode(file.read_bytes())))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise DataError(f"{file}: cannot be read as an image: {reason}") from None
    plan = sampler.stack([sampler(sample_seed(seed, 0, file.name)) for file in files])
    labels = torch.full((len(images),), -1)
    draw_reconstruction(method, Batch(torch.stack(images), plan, labels, [f.name for f in files]), out, title)
