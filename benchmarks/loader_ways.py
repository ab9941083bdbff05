"""The ways of reading that loader.py times in its own process: each is an epoch, a function that returns its images."""

import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import simplejpeg
import webdataset
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from ummim.data import DataConfig, ShardIndex, build_loader, images
from ummim.data.augment import draw_crop, resize
from ummim.data.shards import ShardReader
from ummim.data.turbojpeg import TurboJpeg
from ummim.masking import MaskConfig, PlanSampler

SIZE, GRID, SCALE = 224, (14, 14), (0.2, 1.0)
EPOCHS = 1000  # more than anybody times
Way = Callable[[], int]

# MAE's main_pretrain.py.
MAE = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIZE, SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    ]
)


def mae(images: Path, batch: int) -> Way:
    """As the MAE repository does it: ImageFolder and Pillow."""
    loader = DataLoader(ImageFolder(str(images), transform=MAE), batch, shuffle=True, drop_last=True)
    return lambda: sum(len(views) for views, _ in loader)


def plain_webdataset(shards: Path, batch: int) -> Way:
    """The same transforms behind webdataset's own reader."""
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = webdataset.WebDataset(urls, shardshuffle=False).shuffle(500).decode("pil").to_tuple("jpg", "cls")
    loader = DataLoader(samples.map_tuple(MAE, int).batched(batch, partial=False), batch_size=None)
    return lambda: sum(len(views) for views, _ in loader)


def ours(index: ShardIndex, batch: int, throw_ratio: float) -> Way:
    """``build_loader``: masks attached, uint8; normalising is the device's part."""
    data, steps = DataConfig(str(index.folder), workers=0, image_size=SIZE), len(index) // batch
    plan = SimpleNamespace(
        micro_batch=batch, accumulation=1, global_batch=batch, steps_per_epoch=steps, stop_step=EPOCHS * steps
    )
    loader = build_loader(index, data, PlanSampler(GRID, MaskConfig(), throw_ratio), 0, plan, 0, 1)
    batches = iter(loader)
    return lambda: sum(len(each.images) for each in islice(batches, steps))


def masks(index: ShardIndex, batch: int, throw_ratio: float) -> Way:
    """What masks are of ``ours``: the plans of the same samples, batch by batch."""
    sampler = PlanSampler(GRID, MaskConfig(), throw_ratio)
    sampler.warm_up()
    keys = [index.key(row) for row in range(len(index) // batch * batch)]

    def epoch() -> int:
        for start in range(0, len(keys), batch):
            seeds = [sampler.seed(0, 0, key, start) for key in keys[start : start + batch]]
            sampler.batch(seeds)
        return len(keys)

    return epoch


def bare_decode(index: ShardIndex, batch: int) -> Way:
    """libjpeg-turbo alone: the images of ``ours``, from memory; nothing is cropped or resized."""
    reader = ShardReader(index)
    files = [reader.read(row) for row in range(len(index) // batch * batch)]
    reader.close()

    def epoch() -> int:
        for data in files:
            simplejpeg.decode_jpeg(data)
        return len(files)

    return epoch


def bare_crops(index: ShardIndex, batch: int, library: TurboJpeg, resized: bool = False) -> Way:
    """libjpeg-turbo alone: crops like those of ``ours``, and nothing of what they leave out; or resized as ours are."""
    reader, config, crops = ShardReader(index), DataConfig("", image_size=SIZE), []
    for row in range(len(index) // batch * batch):
        data = reader.read(row)
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        crops.append((data, draw_crop(random.Random(row), width, height, config.crop_scale, config.crop_ratio)))
    reader.close()

    def epoch() -> int:
        for data, crop in crops:
            pixels = library.part(data, *crop)
            if resized and pixels is not None:
                resize(pixels, (SIZE, SIZE), config.interpolation)
        return len(crops)

    return epoch


def decoding(way: Way, library: TurboJpeg | None) -> Way:
    """``way`` with crops decoded by ``library``, or whole images by simplejpeg."""

    def epoch() -> int:
        images.turbojpeg = lambda: library  # type: ignore[assignment]
        return way()

    return epoch
