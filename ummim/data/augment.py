"""Random crop and flip, as in the papers' code: on the Pillow image, before it becomes a tensor."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.tv_tensors import BoundingBoxes

from ummim.data.config import DataConfig
from ummim.data.images import decode

View = Literal["random", "centre", "whole"]

PADDING = 4  # of the padded crop, in pixels (MFF)


class Box(NamedTuple):
    """Where the edges of a view lie in its image, as shares of the image's width or height.

    In a flipped view, ``left`` is above ``right``. A padded crop may reach beyond [0, 1].
    """

    left: float
    top: float
    right: float
    bottom: float


class Augment:
    """Training and evaluation views of an image, uint8 (3, S, S) with S = ``image_size``."""

    def __init__(self, config: DataConfig) -> None:
        size = config.image_size
        self.random = v2.Compose(
            [
                *_random_crop(config),
                v2.RandomHorizontalFlip(config.hflip),
                v2.PILToTensor(),
            ]
        )
        self.whole = v2.Compose(
            [
                v2.Resize((size, size), InterpolationMode.BICUBIC, antialias=True),
                v2.PILToTensor(),
            ]
        )
        self.centre = v2.Compose(
            [
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
        image = decode(data)
        if kind == "random":
            return self(image, seed)
        return (self.centre if kind == "centre" else self.whole)(image)

    def located_view(self, data: bytes, seed: int) -> tuple[Tensor, Box]:
        """The random view, and where it lies in the image; see ``view``. Resized crops only."""
        return self.located(decode(data), seed)

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Random crop and flip, a pure function of image and ``seed``; torch's own generator stays put."""
        with _seeded(seed):
            return self.random(image)

    def located(self, image: Image.Image, seed: int) -> tuple[Tensor, Box]:
        """The view that ``self(image, seed)`` is, and where it lies; resized crops only.

        Two boxes take part in the transforms, the image's outline and its left edge, and tell what became of it.
        """
        width, height = image.size
        corners = [[0.0, 0.0, width, height], [0.0, 0.0, 0.0, height]]
        outline = BoundingBoxes(
            corners, dtype=torch.float64, format="XYXY", canvas_size=(height, width), clamping_mode=None
        )
        with _seeded(seed):
            view, outline = self.random(image, outline)
        (x0, y0, x1, y1), (edge, *_) = outline.tolist()  # the image's sides in the view, in its pixels
        size = view.shape[-1]
        left, right = -x0 / (x1 - x0), (size - x0) / (x1 - x0)
        if edge > (x0 + x1) / 2:  # flipped
            left, right = 1 - left, 1 - right
        return view, Box(left, -y0 / (y1 - y0), right, (size - y0) / (y1 - y0))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's own generator for the block, and leave it afterwards as it was."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def _random_crop(config: DataConfig) -> list[v2.Transform]:
    """From an image of any size to a random square of ``image_size`` pixels."""
    size, filtering = config.image_size, InterpolationMode(config.interpolation)
    if config.crop == "padded":
        return [
            v2.Resize(size, filtering, antialias=True),
            v2.RandomCrop(size, padding=PADDING, padding_mode="reflect"),
        ]
    return [v2.RandomResizedCrop(size, config.crop_scale, config.crop_ratio, filtering, antialias=True)]
