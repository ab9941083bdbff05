"""Where images come from: a labelled folder tree, a flat folder, or IDX (MNIST format) files."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from data_prep.idx import IDX_IMAGES, encode_png, labels_beside, read_idx
from ummim.data.shards import UNLABELLED
from ummim.errors import DataError

SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
    ]
)


class Item(NamedTuple):
    """One image of a source: a file, or (``position`` >= 0) an image inside an IDX file."""

    key: str
    path: str
    label: int
    size: int  # bytes
    position: int = -1

    def read(self) -> bytes:
        if self.position < 0:
            return Path(self.path).read_bytes()
        return encode_png(_idx_images(self.path)[self.position])

    @property
    def name(self) -> str:
        return self.path if self.position < 0 else f"{self.path}[{self.position}]"


@dataclass(frozen=True)
class Source:
    """Items sorted by path, with unique keys; ``classes`` by label, or None without labels."""

    items: list[Item]
    classes: list[str] | None


def open_source(src: Path, unlabelled: bool = False) -> Source:
    """List the images of ``src``.

    Raises:
        DataError: ``src`` is missing, holds no image file, or mixes images and class folders.
    """
    if not src.exists():
        raise DataError(f"{src} does not exist: give a folder of images or an IDX file")
    if src.is_file():
        return _idx_source(src)
    files = sorted(_walk(src, src))
    idx = [src / name for name, _ in files if IDX_IMAGES.search(name) and "/" not in name]
    if idx:
        train = [path for path in idx if path.name.startswith("train")]
        if len(train or idx) > 1:
            names = ", ".join(path.name for path in idx)
            raise DataError(f"{src} holds several IDX files ({names}): give one of them as SRC")
        return _idx_source((train or idx)[0])
    images = [(name, size) for name, size in files if PurePath(name).suffix.lower() in SUFFIXES]
    if not images:
        found = f"its {len(files)} files are none of {', '.join(sorted(SUFFIXES))}" if files else "it is empty"
        raise DataError(f"{src} holds no images: {found}")
    nested = ["/" in name for name, _ in images]
    if any(nested) and not all(nested) and not unlabelled:
        stray = images[nested.index(False)][0]
        raise DataError(
            f"{src} holds class folders and images beside them ({stray}): move these into a class folder, "
            "or take everything without labels: --unlabelled"
        )
    if unlabelled or not any(nested):
        return Source(_items(src, images, None), None)
    classes = sorted({name.split("/", 1)[0] for name, _ in images})
    for name in classes:
        if name.splitlines() != [name]:
            raise DataError(f"{src}: the class folder {name!r} has a line break in its name: rename it")
    return Source(_items(src, images, classes), [_printable(name) for name in classes])


def make_key(name: str, used: set[str]) -> str:
    """A WebDataset key from a relative path: its extension goes, dots become underscores.

    ``a.jpg`` and ``a.png`` in one folder become ``a`` and ``a_png``; ``used`` holds the keys given so far.
    """
    suffix = PurePath(name).suffix
    stem = name.removesuffix(suffix)
    key = candidate = re.sub(r"[.\x00-\x1f\x7f\ud800-\udfff]", "_", stem)
    count = 1
    while candidate in used:
        candidate = f"{key}_{suffix[1:].lower()}" + (f"-{count}" if count > 1 else "")
        count += 1
    used.add(candidate)
    return candidate


def _walk(folder: Path, root: Path, above: tuple[str, ...] = ()) -> Iterator[tuple[str, int]]:
    """(path below ``root``, bytes) of every file that is not hidden; links are followed, loops are not."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), root, (*above, real))
            else:
                size = entry.stat().st_size if entry.is_file() else 0  # 0: a dangling link, reported when read
                yield os.path.relpath(entry.path, root), size


def _items(src: Path, images: list[tuple[str, int]], classes: list[str] | None) -> list[Item]:
    label = {name: i for i, name in enumerate(classes or [])}
    used: set[str] = set()
    return [
        Item(
            make_key(name, used),
            f"{src}/{name}",
            label[name.split("/", 1)[0]] if classes else UNLABELLED,
            size,
        )
        for name, size in images
    ]


def _idx_source(path: Path) -> Source:
    images = _idx_images(str(path))
    if images.ndim != 3:
        raise DataError(f"{path} holds {images.ndim}-dimensional data; images are 3-dimensional (count, rows, columns)")
    labels_path = labels_beside(path)
    labels = np.full(len(images), UNLABELLED) if labels_path is None else read_idx(labels_path)
    if labels.shape != (len(images),):
        raise DataError(f"{labels_path} holds {labels.size} labels for the {len(images)} images of {path.name}")
    stem = IDX_IMAGES.sub("", path.name).strip("-_.") or "image"
    size = int(images[0].size) if len(images) else 0
    items = [Item(f"{make_key(stem, set())}-{i:06d}", str(path), int(label), size, i) for i, label in enumerate(labels)]
    if not items:
        raise DataError(f"{path} holds no images")
    return Source(items, None if labels_path is None else [str(i) for i in range(int(labels.max()) + 1)])


@lru_cache(maxsize=1)
def _idx_images(path: str) -> np.ndarray:
    return read_idx(Path(path))


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
