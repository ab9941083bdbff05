"""Random resized crop and flip, as in the MAE code: on the Pillow image, before it becomes a tensor."""

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from ummim.data.config import DataConfig


class Augment:
    """Training and evaluation views of an image, uint8 (3, S, S) with S = ``image_size``."""

    def __init__(self, config: DataConfig) -> None:
        size = config.image_size
        filtering = InterpolationMode(config.interpolation)
        self.random = v2.Compose(
            [
                v2.RandomResizedCrop(size, config.crop_scale, config.crop_ratio, filtering, antialias=True),
                v2.RandomHorizontalFlip(config.hflip),
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

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Random crop and flip, a pure function of image and ``seed``; torch's own generator stays put."""
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(seed)
        try:
            return self.random(image)
        finally:
            torch.default_generator.set_state(state)
