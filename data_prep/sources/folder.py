"""Folder trees of image files: a folder per class, or flat; and images that a pattern finds."""

import os
import re
from collections.abc import Sequence
from pathlib import PurePath
from urllib.parse import unquote

from data_prep.sources.item import Item, Source, check_classes, make_key
from ummim.data.shards import UNLABELLED
from ummim.data.urls import is_web, join, shown
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
_LITTER = frozenset(["thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"])  # of file managers
_SHOWN = 6  # suffixes of files that are left out


def is_image(name: str) -> bool:
    return PurePath(name).suffix.lower() in SUFFIXES


def is_litter(name: str) -> bool:
    return name.rpartition("/")[2].lower() in _LITTER


def folder_source(src: str, images: list[tuple[str, int]], unlabelled: bool, others: Sequence[str] = ()) -> Source:
    """The ``images`` (path below ``src``, bytes); the first folder of a path is its class.

    The list of ``images`` is emptied, so that millions of them are not in memory twice. ``others``: the files of
    ``src`` that are no images.

    Raises:
        DataError: some images lie in folders and some do not, a class folder has none, or the name of a class cannot be
            listed.
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
    _check_folders(src, classes, others)
    return Source(_items(src, images, classes), check_classes(src, classes))


def listed_source(paths: Sequence[str]) -> Source:
    """The images at ``paths``, without labels; keys are relative to the folder that they have in common."""
    parts = [shown(path).split("/") for path in paths]
    common = len(os.path.commonprefix([part[:-1] for part in parts]))
    used: set[str] = set()
    items = []
    for path, part in zip(paths, parts, strict=True):
        name = "/".join(part[common:])
        items.append(Item(make_key(unquote(name) if is_web(path) else name, used), path, UNLABELLED, 0))
    return Source(items, None)


def suffixes(names: Sequence[str]) -> str:
    """What the names of files end in, for messages."""
    found = {PurePath(name).suffix.lower() for name in names}
    dotted = sorted(suffix for suffix in found if re.fullmatch(r"\.\w{1,12}", suffix))
    listed = dotted[:_SHOWN] + (["none"] if len(dotted) < len(found) else [])
    return ", ".join(listed + (["..."] if len(dotted) > _SHOWN else []))


def _check_folders(src: str, classes: Sequence[str], others: Sequence[str]) -> None:
    """Raise DataError if a folder has files, but no image: without its class the others' labels would move."""
    empty = {name.split("/", 1)[0] for name in others if "/" in name} - set(classes)
    if empty:
        folder = min(empty)
        held = [name for name in others if name.startswith(f"{folder}/")]
        raise DataError(
            f"{shown(join(src, folder))} would be a class, but none of its files ({len(held):,}) is an image by its "
            f"suffix ({suffixes(held)}; those of images are {', '.join(sorted(SUFFIXES))}): rename or convert them, "
            "move the folder away, or take all images without labels: --unlabelled"
        )


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
