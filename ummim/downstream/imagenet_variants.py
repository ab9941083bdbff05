"""ImageNet's robustness sets on disk: which classes and corruptions they have, and how to read them.

Sources: ImageNet-A ("Natural Adversarial Examples", Hendrycks et al., 2021), ImageNet-R ("The Many Faces of
Robustness", Hendrycks et al., 2021), ImageNet-Sketch (Wang et al., 2019), ImageNet-C ("Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", Hendrycks and Dietterich, 2019).
"""

import os
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from ummim.data.images import decode
from ummim.data.shards import INDEX, ShardIndex, ShardReader
from ummim.errors import DataError, UserError

SEVERITIES = (1, 2, 3, 4, 5)
# Top-1 error of AlexNet, averaged over the severities: table 1 of Hendrycks and Dietterich (in whole per mille), with
# the digits of their code (github.com/hendrycks/robustness).
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
EXTRA = ("gaussian_blur", "saturate", "spatter", "speckle_noise")  # for validation; no part of the mean
PUBLISHED_IMAGES = {
    "val": 50_000,
    "imagenet-a": 7_500,
    "imagenet-r": 30_000,
    "imagenet-sketch": 50_889,
    "imagenet-c": 50_000 * len(ALEXNET_ERROR) * len(SEVERITIES),
}
_SYNSET = re.compile(r"n\d{8}")


@dataclass
class ImageSet:
    """Labelled images on disk: files, or samples of shards.

    Attributes:
        place: the folder.
        labels: of each image, a place in the model's list of classes.
        files: the images' files; of shards, None.
        rows: the images' rows in the shards' table; of files, empty.
    """

    place: Path
    labels: list[int]
    files: list[str] | None = None
    rows: list[int] = field(default_factory=list)
    _reader: ShardReader | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Where an image lies, for messages."""
        return f"{self.place}, row {self.rows[i]}" if self.files is None else self.files[i]

    def read(self, i: int) -> bytes:
        """The bytes of an image's file. Raises OSError, DataError."""
        if self.files is not None:
            return Path(self.files[i]).read_bytes()
        if self._reader is None:  # one for each process
            self._reader = ShardReader(ShardIndex.open(self.place))
        return self._reader.read(self.rows[i])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_reader": None}


class Views(Dataset):
    """(uint8 (3, size, size), label, fault) of each image: the centre, after resizing the shorter side (bicubic).

    ``fault`` is empty, or says why an image cannot be read, whose view is then black: raised in a worker process, it
    would come with that one's traceback.
    """

    def __init__(self, images: ImageSet, size: int, side: int) -> None:
        self.images, self.size = images, size
        self.transform = v2.Compose(
            [v2.Resize(side, InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size), v2.PILToTensor()]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int, str]:
        label = self.images.labels[i]
        try:
            return self.transform(decode(self.images.read(i))), label, ""
        except (OSError, ValueError, DataError) as error:
            black = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
            return black, label, f"{self.images.name(i)}: cannot be read: {error}; restore it"


def imagenet_classes() -> list[str]:
    """The WordNet ids of ImageNet-1K's classes, sorted: label -> id. From timm."""
    return _listed("imagenet_synsets.txt")


def subset_classes(name: str) -> list[str]:
    """The 200 WordNet ids of ``imagenet-a`` or ``imagenet-r``. From timm."""
    return _listed(f"{name.replace('-', '_')}_synsets.txt")


def _listed(name: str) -> list[str]:
    data = pkgutil.get_data("timm.data", f"_info/{name}")
    assert data is not None
    return data.decode().split()


def open_set(place: Path, classes: Sequence[str], allowed: Sequence[str] | None = None) -> ImageSet:
    """The images of a folder of class folders named by WordNet ids, or of a folder of shards whose classes are.

    Args:
        place: the folder.
        classes: the model's classes by label.
        allowed: the classes that the set may have; all of the model's unless given.

    Raises:
        UserError: no such folder, no class or image in it, or a class that the model or the set has not.
    """
    known = check_set(place, classes, allowed)
    number = {name: i for i, name in enumerate(classes)}
    if (place / INDEX).is_file():
        index = ShardIndex.open(place)
        own = [number.get(name, -1) for name in index.classes or ()]
        return ImageSet(place, [own[label] for label in index.table["label"].tolist()], rows=list(range(len(index))))
    files: list[str] = []
    labels: list[int] = []
    for name in known:
        found = sorted(entry.path for entry in os.scandir(place / name) if entry.is_file() and entry.name[0] != ".")
        files += found
        labels += [number[name]] * len(found)
    if not files:
        raise UserError(f"{place}: its {len(known)} class folders hold no images")
    return ImageSet(place, labels, files)


def check_set(place: Path, classes: Sequence[str], allowed: Sequence[str] | None = None) -> list[str]:
    """The classes that a set has, without listing its images. Raises UserError as :func:`open_set` does."""
    if not place.is_dir():
        raise UserError(f"{place}: no such folder; give the one that holds the classes' folders, or shards")
    if (place / INDEX).is_file():
        index = ShardIndex.open(place)
        if index.classes is None:
            raise UserError(f"{place}: its shards have no labels; build them from the folders of the classes")
        present = [index.classes[label] for label in sorted(set(index.table["label"].tolist()))]
    else:
        present = sorted(entry.name for entry in os.scandir(place) if entry.is_dir() and _SYNSET.fullmatch(entry.name))
    _check_known(place, present, classes, allowed)
    return present


def _check_known(place: Path, present: Sequence[str], classes: Sequence[str], allowed: Sequence[str] | None) -> None:
    """Refuse a set without any class, or with one that is not the model's or not the set's."""
    if not present:
        below = sorted(entry.parent for entry in place.glob("*/n????????") if _SYNSET.fullmatch(entry.name))
        hint = f"; did you mean {below[0]}?" if below else "; give the one that holds them, or shards of them"
        raise UserError(f"{place}: holds no class folders named by WordNet ids, such as n01440764{hint}")
    for names, problem in (
        (classes, "is none of the model's classes; name these with --classes"),
        (allowed, "is no class of this set; is it another set's folder?"),
    ):
        strange = sorted(set(present) - set(names)) if names is not None else []
        if strange:
            more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
            raise UserError(f"{place}: {strange[0]}{more} {problem}")


def find_corruptions(place: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """ImageNet-C's folders: {corruption: those of its severities 1 to 5}, and the extra corruptions that are there.

    A corruption's folder lies in ``place`` or, as the authors' tars unpack, in one of a group (noise, blur, ...).

    Raises:
        UserError: corruptions or severities that are missing.
    """
    if not place.is_dir():
        raise UserError(f"{place}: no such folder; give the one that holds gaussian_noise, shot_noise, ...")
    found = {path.name: path for path in sorted([*place.glob("*"), *place.glob("*/*")]) if path.is_dir()}
    missing = [name for name in ALEXNET_ERROR if name not in found]
    if missing:
        raise UserError(
            f"{place}: ImageNet-C has {len(ALEXNET_ERROR)} corruptions, here are missing: {', '.join(missing)}"
        )
    sets = {name: [found[name] / str(severity) for severity in SEVERITIES] for name in ALEXNET_ERROR}
    absent = [str(path) for paths in sets.values() for path in paths if not path.is_dir()]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise UserError(f"{absent[0]}{more}: no such folder; each corruption has the severities 1 to 5")
    return sets, [name for name in EXTRA if name in found]
