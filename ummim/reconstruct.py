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
from ummim.visualize import predicted_pixels, reconstruction_figure, save_figure


@torch.no_grad()
def draw_reconstruction(method: Method, batch: Batch, path: Path | None, title: str = "") -> None:
    """Reconstruct ``batch``, which is on the method's device, and write the figure; a method that predicts
    features instead of pixels draws none.

    Under ZeRO-3 every rank must call; those that only compute pass ``path=None``.
    """
    if not method.predicts_pixels:
        return
    images, training = normalise(batch.images), method.training
    output = method.eval()(images, batch.plan)
    method.train(training)
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
        UserError: a method that predicts no pixels.
    """
    if not method.predicts_pixels:
        raise UserError(f"{type(method).__name__} predicts features, not pixels: there is nothing to draw")
    augment, sampler, images = Augment(recipe.data), recipe.sampler(), []
    for file in files:
        try:
            images.append(augment.centre(decode(file.read_bytes())))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise DataError(f"{file}: cannot be read as an image: {reason}") from None
    plan = sampler.stack([sampler(sampler.seed(seed, 0, file.name, 0)) for file in files])
    labels = torch.full((len(images),), -1)
    draw_reconstruction(method, Batch(torch.stack(images), plan, labels, [f.name for f in files]), out, title)
