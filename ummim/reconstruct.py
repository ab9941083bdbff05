"""Reconstruct images with a method and draw the figure, during training and from a checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ummim.data import Batch
from ummim.data.augment import Augment
from ummim.data.images import decode
from ummim.data.normalise import denormalise, normalise
from ummim.errors import DataError, UserError
from ummim.methods.api import Method
from ummim.recipe import Recipe
from ummim.visualize import (
    Reconstruction,
    comparison_figure,
    predicted_pixels,
    reconstruction_figure,
    save_figure,
)

_NORM_PIX = "norm-pix, each patch's mean and contrast are the original's"


@torch.no_grad()
def reconstruct(method: Method, batch: Batch) -> Reconstruction:
    """What ``method`` makes of ``batch``, which is on its device."""
    images, training = normalise(batch.images), method.training
    output = method.eval()(images, batch.plan)
    method.train(training)
    pixels, covered = predicted_pixels(images, output, method.patch_size, method.norm_pix_loss)
    return Reconstruction(batch.plan, denormalise(pixels), covered)


def draw_reconstruction(method: Method, batch: Batch, path: Path | None, title: str = "") -> None:
    """Reconstruct ``batch``, which is on the method's device, and write the figure; a method that predicts
    features instead of pixels draws none.

    Under ZeRO-3 every rank must call; those that only compute pass ``path=None``.
    """
    if not method.predicts_pixels:
        return
    plan, prediction, covered = reconstruct(method, batch)
    if path is None:
        return
    if method.norm_pix_loss:
        title += f"   ({_NORM_PIX})"
    save_figure(reconstruction_figure(batch.images, plan, prediction, covered, title), path)


def reconstruct_files(
    recipe: Recipe, method: Method, files: Sequence[Path], out: Path, seed: int = 0, title: str = ""
) -> None:
    """Reconstruct image files under the recipe's masks and write the figure to ``out``.

    Raises:
        DataError: a file that cannot be read or decoded.
        UserError: a method that predicts no pixels.
    """
    _check_pixels(method)
    draw_reconstruction(method, _batch(recipe, files, seed), out, title)


def compare_files(
    models: Sequence[tuple[str, Recipe, Method]], files: Sequence[Path], out: Path, seed: int = 0
) -> None:
    """Reconstruct image files by several models, each under its recipe's masks, and write the figure to ``out``.

    Models whose masks differ only in their throwing see the same patches: the seeds of the masks are the same.

    Raises:
        DataError: a file that cannot be read or decoded.
        UserError: a method that predicts no pixels, or images of another size than the first model's.
    """
    size, made = models[0][1].data.image_size, []
    for name, recipe, method in models:
        _check_pixels(method)
        if recipe.data.image_size != size:
            raise UserError(
                f"{name} takes images of {recipe.data.image_size} pixels, {models[0][0]} of {size}: compare runs of "
                "the same data.image_size"
            )
        batch = _batch(recipe, files, seed)
        made.append((name, reconstruct(method, batch)))
    normalised = ", ".join(name for name, _, method in models if method.norm_pix_loss)
    title = f"{_NORM_PIX}: {normalised}" if normalised else ""
    save_figure(comparison_figure(batch.images, made, title), out)


def _check_pixels(method: Method) -> None:
    if not method.predicts_pixels:
        raise UserError(f"{type(method).__name__} predicts features, not pixels: there is nothing to draw")


def _batch(recipe: Recipe, files: Sequence[Path], seed: int) -> Batch:
    """Centre crops of image files with masks of the recipe's kind."""
    augment, sampler, images = Augment(recipe.data), recipe.sampler(), []
    for file in files:
        try:
            images.append(augment.centre(decode(file.read_bytes())))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise DataError(f"{file}: cannot be read as an image: {reason}") from None
    plan = sampler.stack([sampler(sampler.seed(seed, 0, file.name, 0)) for file in files])
    return Batch(torch.stack(images), plan, torch.full((len(images),), -1), [file.name for file in files])
