"""Pictures for a page, as data URIs: the gallery's frames within a budget, and maps over the token grid."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

FRAMES = 24  # most of a run
WIDTHS = (960, 720, 480, 320)  # pixels; the first that lets LEAST frames into the budget
LEAST = 8


class Frame(NamedTuple):
    """A figure of the gallery."""

    epoch: int
    uri: str
    size: tuple[int, int]  # width and height in pixels


def gallery(figures: Sequence[tuple[int, Path]], budget: int) -> tuple[list[Frame], list[str]]:
    """Frames of a run's figures, the first, the last and evenly spaced ones between them, and what could not be read.

    figures: (epoch, file) in order. budget: characters that all frames together may take, about.
    """
    frames: list[Frame] = []
    broken: list[str] = []
    for width in WIDTHS:
        last = next((frame for each in reversed(figures) if (frame := _frame(*each, width, broken))), None)
        if last is None:
            return [], sorted(set(broken))
        room = max(2, budget // (len(last.uri) + 1))
        if room >= min(LEAST, len(figures)) or width == WIDTHS[-1]:
            chosen = spread(figures, min(FRAMES, room))
            frames = [frame for each in chosen if (frame := _frame(*each, width, broken))]
            break
    return frames, sorted(set(broken))


def spread(items: Sequence[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    """At most ``most`` items: the first, the last, and evenly spaced ones."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def jpeg(picture: Image.Image, quality: int = 82) -> str:
    """A picture as a data URI, in JPEG."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def tiles(colours: np.ndarray) -> str:
    """(h, w, 3) or (h, w, 4) uint8, a pixel per token, as a PNG's data URI; the page enlarges it to squares."""
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def shaded(share: np.ndarray, colour: tuple[int, int, int], full: float) -> str:
    """(h, w) floats as shades of one colour: none at 0, all of it at ``full``. See ``tiles``."""
    alpha = (np.clip(share / full, 0, 1) * 255).round().astype(np.uint8)
    return tiles(np.dstack([np.broadcast_to(np.array(colour, np.uint8), (*share.shape, 3)), alpha]))


def _frame(epoch: int, path: Path, width: int, broken: list[str]) -> Frame | None:
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        broken.append(path.name)
        return None
    if picture.width > width:
        size = (width, max(1, round(picture.height * width / picture.width)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return Frame(epoch, jpeg(picture), picture.size)
