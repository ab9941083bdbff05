"""Views of labelled images: for training, RandAugment and erasing after the random crop; for evaluation, the centre.

Crop and flip are ``Augment``'s. timm's RandAugment and RandomErasing and torchvision's ColorJitter do the rest (MAE's
fine-tuning, table 9; SimMIM's). They draw from the global generators of Python, NumPy and PyTorch, which are seeded
for each sample and put back: a view is a pure function of image and seed. Views are uint8, so the noise in an erased
rectangle is cut off at black and white.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, posterize, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from ummim.data.augment import Augment
from ummim.data.config import LabelledDataConfig
from ummim.data.images import decode
from ummim.data.normalise import IMAGENET_MEAN, denormalise, normalise

_PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class LabelledAugment:
    """Training and evaluation views of an image, uint8 (3, S, S) with S = ``image_size``."""

    def __init__(self, config: LabelledDataConfig) -> None:
        size = config.image_size
        self.crop = Augment(config)
        self.colours: RandAugment | v2.ColorJitter | None = None
        if config.randaugment:
            self.colours = _randaugment(config.randaugment, size, config.interpolation)
        elif config.color_jitter:
            strength = config.color_jitter
            self.colours = v2.ColorJitter(strength, strength, strength)
        self.probability = config.erasing
        self.erase = RandomErasing(1.0, mode="pixel", device="cpu")
        self.centre = v2.Compose(
            [
                v2.Resize(config.eval_side, InterpolationMode.BICUBIC, antialias=True),
                v2.CenterCrop(size),
                v2.PILToTensor(),
            ]
        )

    def train_view(self, data: bytes, seed: int) -> Tensor:
        """From an image file's bytes to a random view. Raises ``ValueError`` for bytes that are no image."""
        view = self.crop.view(data, seed)
        if self.colours is None and not self.probability:
            return view
        with seeded(f"{seed} augment"):
            if self.colours is not None:
                image = Image.fromarray(view.permute(1, 2, 0).numpy())
                view = torch.from_numpy(np.array(self._coloured(image))).permute(2, 0, 1)
            if random.random() < self.probability:
                pixels = normalise(view[None])[0]  # noise of variance 1 among pixels of variance 1
                view = denormalise(self.erase(pixels)).mul(255).round().clamp(0, 255).byte()
        return view

    def _coloured(self, image: Image.Image) -> Image.Image:
        assert self.colours is not None
        try:
            return self.colours(image)
        except ValueError as error:  # which from here would pass for a bad image
            raise RuntimeError("an augmentation has failed") from error

    def eval_view(self, data: bytes) -> Tensor:
        """From an image file's bytes to its centre. Raises ``ValueError`` for bytes that are no image."""
        return self.centre(decode(data))


def _randaugment(config: str, size: int, interpolation: str) -> RandAugment:
    """timm's, with what its transform for training takes from the image's size and colours."""
    grey = tuple(min(255, round(255 * mean)) for mean in IMAGENET_MEAN)
    sizes = {"translate_const": int(size * 0.45), "img_mean": grey, "interpolation": _PILLOW[interpolation]}
    augment = rand_augment_transform(config, sizes)
    for operation in augment.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits: int, **others: Any) -> Image.Image:
    """timm's; it may ask for 0 bits, which Pillow made black and now refuses."""
    return posterize(image, bits, **others) if bits > 0 else Image.new(image.mode, image.size)


@contextmanager
def seeded(text: str) -> Iterator[None]:
    """Within it, the global generators draw what follows from ``text`` alone; then they go on as if nothing was."""
    seeds = random.Random(text)
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seeds.getrandbits(64))
        np.random.seed(seeds.getrandbits(32))
        torch.default_generator.manual_seed(seeds.getrandbits(63))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
