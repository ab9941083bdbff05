"""Reconstruction figures: what the encoder saw and what the network made of it, one row per image."""

from collections.abc import Sequence
from errno import EISDIR
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ummim.atomic import atomic_write
from ummim.masking import MaskPlan
from ummim.methods.api import MIMOutput
from ummim.nn.targets import normalise_patches, patchify, unpatchify

COLUMNS = ("input and plan", "encoder sees", "pasted", "reconstruction", "original")
VISIBLE, SECONDARY, KEPT, THROWN = (60, 170, 75), (245, 190, 40), (70, 110, 220), (205, 60, 60)
_GREY = 0.5
_GAP = 6  # pixels between cells
_HEAD = 44  # pixels above the first row


class Reconstruction(NamedTuple):
    """What one model made of some images."""

    plan: MaskPlan
    prediction: Tensor  # (B, 3, H, W) float in [0, 1]
    covered: Tensor  # (B, 1, H, W) bool: where ``prediction`` is defined


def predicted_pixels(images: Tensor, output: MIMOutput, patch: int, norm_pix: bool) -> tuple[Tensor, Tensor]:
    """Pictures of a method's prediction.

    Args:
        images: (B, 3, H, W) float in [0, 1] or normalised: the space the method predicts in.
        output: the method's output on them.
        patch: side of a mask patch, in pixels.
        norm_pix: the prediction is in units of each patch's deviation. Mean and deviation are then taken from
            the original patch, as in MAE's own figures: the network predicts neither.

    Returns:
        (B, 3, H, W) prediction in the space of ``images``, and (B, 1, H, W) bool of the pixels it covers.
    """
    grid = (images.shape[2] // patch, images.shape[3] // patch)
    tokens = output.prediction.to(images.dtype)
    if norm_pix:
        _, mean, deviation = normalise_patches(patchify(images, patch))
        tokens = tokens * deviation + mean
    covered = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=images.device)
    covered = covered.scatter(1, output.ids, True)
    return unpatchify(tokens, grid, patch), _pixels(covered, grid, patch)


def reconstruction_figure(
    images: Tensor, plan: MaskPlan, prediction: Tensor, covered: Tensor, title: str = ""
) -> Image.Image:
    """Draw a row per image.

    Args:
        images: (B, 3, H, W) uint8 originals.
        plan: their mask plan.
        prediction: (B, 3, H, W) float in [0, 1].
        covered: (B, 1, H, W) bool, where ``prediction`` is defined.
        title: a line above the legend.

    Returns:
        An RGB picture: the input with its tokens coloured by what the plan makes of them; what the encoder sees;
        the prediction with visible pixels pasted in; the prediction alone; the original.
    """
    originals = images.cpu().float() / 255
    prediction, covered, plan = prediction.cpu().float().clamp(0, 1), covered.cpu(), plan.to("cpu")
    patch = originals.shape[2] // plan.grid[0]
    colour, seen = _plan_colours(plan, patch)  # (B, 3, H, W), (B, 1, H, W)
    blank = torch.full_like(originals, _GREY)
    masked = _pixels(plan.mask(), plan.grid, patch)
    alone = torch.where(covered, prediction, blank)
    cells = (
        0.6 * originals + 0.4 * colour,
        torch.where(seen, originals, 0.35 * blank + 0.35 * colour),
        torch.where(masked, alone, originals),
        alone,
        originals,
    )
    zoom = max(1, 160 // originals.shape[2])
    return _sheet(COLUMNS, [_rows_of(cell, zoom) for cell in cells], [plan], title)


def comparison_figure(images: Tensor, models: Sequence[tuple[str, Reconstruction]], title: str = "") -> Image.Image:
    """Draw a row per image: the original, and for each model its mask plan and its prediction, visible patches pasted.

    Args:
        images: (B, 3, H, W) uint8 originals.
        models: names, and what each model made of the images.
        title: a line above the legend, which counts the tokens that all plans have the same number of.
    """
    originals = images.cpu().float() / 255
    zoom = max(1, 160 // originals.shape[2])
    names, columns = ["original"], [_rows_of(originals, zoom)]
    for name, (plan, prediction, covered) in models:
        plan = plan.to("cpu")
        patch = originals.shape[2] // plan.grid[0]
        colour, _ = _plan_colours(plan, patch)
        masked = _pixels(plan.mask(), plan.grid, patch)
        alone = torch.where(covered.cpu(), prediction.cpu().float().clamp(0, 1), _GREY)
        names += [name, f"{plan.kept.shape[1]} kept, {plan.thrown.shape[1]} thrown"]
        columns += [_rows_of(cell, zoom) for cell in (colour, torch.where(masked, alone, originals))]
    return _sheet(names, columns, [model.plan for _, model in models], title)


def save_figure(picture: Image.Image, path: Path) -> None:
    """Write a PNG atomically: a reader never sees half of it.

    Raises:
        OSError: ``path`` is a folder or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(EISDIR, "is a folder", str(path))
    with atomic_write(path) as file:
        picture.save(file, format="PNG")


def _pixels(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(B, h * w) -> (B, 1, H, W): each token's value over its patch."""
    image = tokens.view(tokens.shape[0], 1, *grid)
    return image.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def _plan_colours(plan: MaskPlan, patch: int) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) colour of each token's part in the plan, and (B, 1, H, W) where the encoder sees pixels."""
    b, (h, w) = plan.batch_size, plan.grid
    part = torch.zeros(b, h * w, dtype=torch.int64)
    part.scatter_(1, plan.visible, plan.secondary.long())
    part.scatter_(1, plan.kept, 2).scatter_(1, plan.thrown, 3)
    palette = torch.tensor([VISIBLE, SECONDARY, KEPT, THROWN], dtype=torch.float32) / 255
    colour = palette[_pixels(part, plan.grid, patch)[:, 0]].permute(0, 3, 1, 2)
    return colour, _pixels(part == 0, plan.grid, patch)


def _rows_of(cells: Tensor, zoom: int) -> list[Image.Image]:
    pixels = (cells.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    side = pixels.shape[1] * zoom
    return [Image.fromarray(cell).resize((side, side), Image.Resampling.NEAREST) for cell in pixels]


def _counts(plan: MaskPlan) -> tuple[int, int, int, int]:
    """How many tokens of a sample are visible, secondary, kept and thrown."""
    secondary = int(plan.secondary[0].sum())
    return plan.visible.shape[1] - secondary, secondary, plan.kept.shape[1], plan.thrown.shape[1]


def _sheet(
    names: Sequence[str], columns: list[list[Image.Image]], plans: Sequence[MaskPlan], title: str
) -> Image.Image:
    side = columns[0][0].width
    sheet = Image.new(
        "RGB",
        (_GAP + len(columns) * (side + _GAP), _HEAD + 16 + len(columns[0]) * (side + _GAP)),
        "white",
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    draw.text((_GAP, 4), title, fill="black", font=font)
    x = float(_GAP)
    parts = (("visible", VISIBLE), ("secondary", SECONDARY), ("kept", KEPT), ("thrown", THROWN))
    for (name, colour), counts in zip(parts, zip(*map(_counts, plans), strict=True), strict=True):
        if not any(counts):
            continue
        draw.rectangle((x, 24, x + 10, 34), fill=colour)
        text = f"{name} {counts[0]}" if len(set(counts)) == 1 else name
        draw.text((x + 14, 22), text, fill="black", font=font)
        x += 30 + draw.textlength(text, font=font)
    for i, (name, column) in enumerate(zip(names, columns, strict=True)):
        x = _GAP + i * (side + _GAP)
        draw.text((x, _HEAD), name, fill="black", font=font)
        for j, cell in enumerate(column):
            sheet.paste(cell, (int(x), _HEAD + 16 + j * (side + _GAP)))
    return sheet
