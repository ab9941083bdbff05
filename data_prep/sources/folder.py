"""Folder trees of image files: a folder per class, or flat."""

from pathlib import PurePath

from data_prep.sources.item import Item, Source, check_classes, make_key
from ummim.data.shards import UNLABELLED
from ummim.data.urls import join
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
        ".jp2",
        ".avif",
    ]
)


def is_image(name: str) -> bool:
    return PurePath(name).suffix.lower() in SUFFIXES


def folder_source(src: str, images: list[tuple[str, int]], unlabelled: bool) -> Source:
    """The ``images`` (path below ``src``, bytes); the first folder of a path is its class.

    The list of ``images`` is emptied, so that millions of them are not in memory twice.

    Raises:
        DataError: some lie in folders and some do not, or the name of a class cannot be listed.
    """
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
    return Source(_items(src, images, classes), check_classes(src, classes))


def _items(src: str, images: list[tuple[str, int]], classes: list[str] | None) -> list[Item]:
    label = {name: i for i, name in enumerate(classes or [])}
    used: set[str] = set()
    items = []
    images.reverse()
    while images:
        name, size = images.pop()
        own = label[name.split("/", 1)[0]] if classes else UNLABELLED
        items.append(Item(make_key(name, used), join(src, name), own, size))
    return items
