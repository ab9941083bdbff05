"""Other loaders' turn in loader.py; runs in an environment of its own, where they are installed.

    python benchmarks/loader_others.py {litdata,streaming,ffcv} IMAGES FOLDER BATCH

IMAGES is a folder per class, FOLDER where the library may write its own format. Prints a line once it is ready,
then, for each line that it reads, an epoch's [processor seconds, seconds, images]; ends with its input.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

SIZE, SCALE = 224, (0.2, 1.0)
MAE = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIZE, SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)
Epoch = Callable[[], Iterator[Any]]  # batches; the first part of each is its images


def litdata_sample(entry: tuple[str, int]) -> dict[str, Any]:
    return {"image": Image.open(entry[0]), "label": entry[1]}


def litdata(images: Path, folder: Path, batch: int) -> Epoch:
    import litdata

    class Views(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return MAE(transforms.functional.to_pil_image(sample["image"])), sample["label"]

    files = ImageFolder(str(images)).samples
    litdata.optimize(litdata_sample, files, str(folder), chunk_bytes="64MB", num_workers=1)
    loader = litdata.StreamingDataLoader(Views(str(folder), shuffle=True), batch_size=batch, num_workers=0)
    return lambda: iter(loader)


def streaming(images: Path, folder: Path, batch: int) -> Epoch:
    from streaming import MDSWriter, StreamingDataset

    class Views(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return MAE(sample["image"]), sample["label"]

    with MDSWriter(out=str(folder), columns={"image": "jpeg", "label": "int"}) as writer:
        for path, label in ImageFolder(str(images)).samples:
            with Image.open(path) as image:
                writer.write({"image": image, "label": label})
    dataset = Views(local=str(folder), shuffle=True, batch_size=batch)
    loader: Any = torch.utils.data.DataLoader(dataset, batch_size=batch, num_workers=0)
    return lambda: iter(loader)


def ffcv(images: Path, folder: Path, batch: int) -> Epoch:
    """As in its ImageNet example: JPEGs kept, resized by OpenCV's area average, uint8 tensors."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    folder.mkdir(parents=True)
    file = str(folder / "images.beton")
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    DatasetWriter(file, fields, num_workers=1).from_indexed_dataset(ImageFolder(str(images)))
    decoder = RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=SCALE)
    pipeline = {"image": [decoder, RandomHorizontalFlip(), ToTensor(), ToTorchImage()], "label": None}
    loader: Any = Loader(file, batch, num_workers=1, order=OrderOption.RANDOM, pipelines=pipeline, drop_last=True)
    return lambda: iter(loader)


def main() -> None:
    way = {"litdata": litdata, "streaming": streaming, "ffcv": ffcv}[sys.argv[1]]
    torch.set_num_threads(1)
    epoch = way(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    sum(len(batch[0]) for batch in epoch())  # the first epoch compiles, or fills caches
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        processor, clock = time.process_time(), time.perf_counter()
        count = sum(len(batch[0]) for batch in epoch())
        print(json.dumps([time.process_time() - processor, time.perf_counter() - clock, count]), flush=True)


if __name__ == "__main__":
    main()
