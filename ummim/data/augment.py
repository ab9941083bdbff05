"""Random crop and flip: the distributions of the papers' code and, but for roundings, its pixels, in less time.

A crop is cut out of the decoded array and resized in uint8 by PyTorch's kernel: columns, then rows. Pillow's differs
by a level or two, and by more only at edges against black or white when it begins with the rows: other values are
clipped in between. A crop's place is drawn from Python's own generator, seeded for each sample; its numbers are the
same in every version.
"""

import math
import random
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2

from ummim.data.config import DataConfig
from ummim.data.images import Pixels, decode

View = Literal["random", "centre", "whole"]

PADDING = 4  # of the padded crop, in pixels (MFF)
THIN = 32  # longer than so many widths, an image is trimmed


class Box(NamedTuple):
    """Where the edges of a view lie in its image, as shares of the image's width or height.

    In a flipped view, ``left`` is above ``right``. A padded crop may reach beyond [0, 1].
    """

    left: float
    top: float
    right: float
    bottom: float


class Augment:
    """Training and evaluation views of an image, uint8 (3, S, S) with S = ``image_size``.

    Random views have their colours side by side in memory (channels last).
    """

    def __init__(self, config: DataConfig) -> None:
        self.config, size = config, config.image_size
        self.whole = v2.Compose(
            [
                v2.Resize((size, size), InterpolationMode.BICUBIC, antialias=True),
                v2.PILToTensor(),
            ]
        )
        self.centre = v2.Compose(
            [
                v2.Lambda(trim),
                v2.Resize(size, InterpolationMode.BICUBIC, antialias=True),
                v2.CenterCrop(size),
                v2.PILToTensor(),
            ]
        )

    def view(self, data: bytes, seed: int, kind: View = "random") -> Tensor:
        """From an image file's bytes to the view that a model sees.

        Args:
            data: the file.
            seed: of a random view, which is a pure function of image and seed.
            kind: ``random`` crop and flip, ``centre`` (the whole short side), or ``whole`` (squashed to a square).

        Returns:
            (3, S, S) uint8.

        Raises:
            ValueError: the bytes are no image, or a broken one; the message says why.
        """
        if kind == "random":
            return self.located_view(data, seed)[0]
        return (self.centre if kind == "centre" else self.whole)(decode(data))

    def located_view(self, data: bytes, seed: int) -> tuple[Tensor, Box]:
        """The random view, and where it lies in the image; see ``view``."""
        pixels = Pixels(data)
        if self.config.crop == "padded":
            return self._padded(pixels.whole(), seed)
        place = self._place(pixels.width, pixels.height, seed)
        return self._resized(pixels.part(*place[0]), (pixels.width, pixels.height), *place)

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Random crop and flip of an RGB image, a pure function of image and ``seed``."""
        return self.located(image, seed)[0]

    def located(self, image: Image.Image, seed: int) -> tuple[Tensor, Box]:
        """The view that ``self(image, seed)`` is, and where it lies."""
        pixels = np.array(image)
        if self.config.crop == "padded":
            return self._padded(pixels, seed)
        place = (left, top, w, h), _ = self._place(image.width, image.height, seed)
        return self._resized(pixels[top : top + h, left : left + w], image.size, *place)

    def _place(self, width: int, height: int, seed: int) -> tuple[tuple[int, int, int, int], bool]:
        """(left, top, width, height) of a random crop of an image of that size, and whether it is flipped."""
        rng = random.Random(seed)
        crop = draw_crop(rng, width, height, self.config.crop_scale, self.config.crop_ratio)
        return crop, rng.random() < self.config.hflip

    def _resized(
        self, pixels: np.ndarray, image: tuple[int, int], crop: tuple[int, int, int, int], flipped: bool
    ) -> tuple[Tensor, Box]:
        """The view that is made of a crop's pixels (h, w, 3), and where it lies in an image of that (width, height)."""
        (left, top, w, h), (width, height), size = crop, image, self.config.image_size
        view = resize(pixels, (size, size), self.config.interpolation)
        return _turned(view, Box(left / width, top / height, (left + w) / width, (top + h) / height), flipped)

    def _padded(self, pixels: np.ndarray, seed: int) -> tuple[Tensor, Box]:
        (height, width, _), size, rng = pixels.shape, self.config.image_size, random.Random(seed)
        short = min(height, width)
        h, w = size * height // short, size * width // short
        resized = resize(pixels, (h, w), self.config.interpolation).permute(1, 2, 0).numpy()
        padded = np.pad(resized, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)), mode="reflect")
        top, left = (_below(rng, side + 2 * PADDING - size + 1) for side in (h, w))
        view = torch.from_numpy(padded[top : top + size, left : left + size]).permute(2, 0, 1)
        left, top = left - PADDING, top - PADDING
        box = Box(left / w, top / h, (left + size) / w, (top + size) / h)
        return _turned(view, box, rng.random() < self.config.hflip)


def trim(image: Image.Image) -> Image.Image:
    """``image``, or its middle if it is more than ``THIN`` times as long as wide: the whole of a line of pixels would
    take gigabytes once its short side is resized."""
    width, height = image.size
    limit = THIN * min(width, height)
    if max(width, height) <= limit:
        return image
    w, h = min(width, limit), min(height, limit)
    left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h))


def _turned(view: Tensor, box: Box, flipped: bool) -> tuple[Tensor, Box]:
    return (view.flip(-1), box._replace(left=box.right, right=box.left)) if flipped else (view, box)


def draw_crop(
    rng: random.Random, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a crop in pixels: the distribution of torchvision's ``RandomResizedCrop``.

    The area's share is uniform in ``scale``, the logarithm of width / height in that of ``ratio``, and the place
    anywhere. After ten draws that do not fit comes the largest crop in the middle that has an allowed ratio.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            top, left = _below(rng, height - h + 1), _below(rng, width - w + 1)
            return left, top, w, h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> Tensor:
    """(H, W, 3) uint8 -> (3, h, w) uint8, channels last: antialiased, as Pillow does it."""
    pixels = np.ascontiguousarray(pixels)  # faster here than in torch, which would do it too
    image = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)  # numpy's [None] would hide the memory's layout
    return F.interpolate(image, size, mode=interpolation, antialias=True)[0]


def _below(rng: random.Random, bound: int) -> int:
    """Uniform in [0, bound)."""
    return int(rng.random() * bound)
