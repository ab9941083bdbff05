"""Shards as a source: any WebDataset tars, ours or others', with or without an index, to be sharded anew."""

import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data_prep.locations import exists, open_seekable, read
from data_prep.pool import ordered
from data_prep.scan import IMAGES
from data_prep.sources.item import Item, Source, check_classes, unlabel
from data_prep.tar import Member, sound_members
from ummim.data.shards import CLASSES, INDEX, JOURNAL, TABLE, UNLABELLED, ShardIndex
from ummim.data.urls import beside, is_url, join, shown
from ummim.errors import DataError


def check_finished(folder: str) -> None:
    """Raise DataError if a local ``folder`` holds a build that has not finished; one for a URL has its journal here."""
    if not is_url(folder) and exists(join(folder, JOURNAL)):
        raise unfinished(folder)


def unfinished(folder: str) -> DataError:
    """What is raised for a folder with a build's journal: its tars are a part of the data."""
    return DataError(f"{shown(folder)} holds an unfinished build: run that build to its end first")


def shard_folders(names: Sequence[str]) -> list[str]:
    """Of the folders of the files ``names``, those that hold shards with their index, or an unfinished build."""
    found: dict[str, set[str]] = {}
    for name in names:
        if name.endswith((f"/{INDEX}", f"/{TABLE}", f"/{JOURNAL}")):
            folder, _, mark = name.rpartition("/")
            found.setdefault(folder, set()).add(mark)
    return sorted(folder for folder, marks in found.items() if JOURNAL in marks or {INDEX, TABLE} <= marks)


def indexed_source(folder: str, unlabelled: bool) -> Source:
    """The samples of a folder of shards with an index; keys and labels stay.

    Raises:
        DataError: the index cannot be opened.
    """
    index = ShardIndex.open(folder if is_url(folder) else Path(folder))
    paths = [index.location(number) for number in range(len(index.shards))]
    table = index.table
    rows = zip(*(table[field].tolist() for field in ("key", "shard", "label", "length", "offset")), strict=True)
    items = [
        Item(_checked(str(key, "utf-8"), paths[shard]), paths[shard], label, size, offset, "range")
        for key, shard, label, size, offset in rows
    ]
    return unlabel(items) if unlabelled else Source(items, index.classes)


def tar_source(paths: list[str], unlabelled: bool, workers: int) -> Source:
    """The samples of tars without an index: of each, the image and the number in ``.cls``; other members stay out.

    Classes are named by ``classes.txt`` beside the tars, or "0", "1", ... Symbolic links are counted on standard error.

    Raises:
        DataError: a tar that is cut short or damaged, a label that is missing, is no number or has no class, or a
            key that comes twice.
    """
    items: list[Item] = []
    links: list[str] = []
    for found, left_out in ordered(partial(_samples, labels=not unlabelled), paths, workers):
        items += found
        links += left_out
    if links:
        print(f"{shown(paths[0])}{' and others' if len(paths) > 1 else ''}: {len(links):,} members left out, links or "
              f"special files ({links[0]}{', ...' if len(links) > 1 else ''})", file=sys.stderr)  # fmt: skip
    seen: dict[str, Item] = {}
    for item in items:
        other = seen.setdefault(item.key, item)
        if other is not item:
            raise DataError(f"key {item.key!r} is in {other.path} at byte {other.position} and in {item.path} "
                            f"at byte {item.position}: keys must be unique")  # fmt: skip
    highest = max((item.label for item in items), default=UNLABELLED)
    if highest == UNLABELLED:
        return Source(items, None)
    bare = [item for item in items if item.label == UNLABELLED and item.kind != "none"]
    if bare:
        raise DataError(f"{bare[0].name}: no label, though others have one ({len(bare):,} such samples): "
                        "complete them, or take all without labels: --unlabelled")  # fmt: skip
    classes = _classes(beside(paths[0], CLASSES))
    if classes is not None and highest >= len(classes):
        worst = max(items, key=lambda item: item.label)
        raise DataError(f"{worst.name}: label {highest}, but {CLASSES} names {len(classes)} classes: complete it")
    return Source(items, classes or [str(i) for i in range(highest + 1)])


def _samples(path: str, labels: bool) -> tuple[list[Item], list[str]]:
    """The samples of a tar, and the names of members that are no files.

    A sample is a run of members with the same name up to the first dot (WebDataset's rule).
    """
    items: list[Item] = []
    left_out: list[str] = []
    key = ""
    found: dict[str, Member] = {}  # members, by extension, of the sample that is being read
    with open_seekable(path) as file:
        for member in sound_members(file, path, left_out=left_out):
            folder, slash, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if re.fullmatch(r"__.*__", stem):
                continue  # WebDataset's notes about the shard
            if folder + slash + stem != key:
                items += [_item(path, key, found, labels)] if found else []
                key, found = folder + slash + stem, {}
            if extension.lower() in found:
                raise DataError(f"{path}: key {key!r} comes twice, again at byte {member.offset}: keys must be unique")
            found[extension.lower()] = member
    return items + ([_item(path, key, found, labels)] if found else []), left_out


def _item(path: str, key: str, found: dict[str, Member], labels: bool) -> Item:
    image = next((found[extension] for extension in IMAGES if extension in found), None)
    label = UNLABELLED
    if labels and "cls" in found:
        text = read(path, found["cls"].offset, found["cls"].size)
        if not re.fullmatch(rb"\s*\d{1,9}\s*", text):
            raise DataError(f"{path}: key {key!r} has the label {text[:40]!r} in .cls, not a number from 0: "
                            "mend it, or take the images without labels: --unlabelled")  # fmt: skip
        label = int(text)
    if image is None:
        return Item(_checked(key, path), path, label, 0, next(iter(found.values())).offset, "none")
    return Item(_checked(key, path), path, label, image.size, image.offset, "range")


def _checked(key: str, path: str) -> str:
    """``key``, if unpacking a shard would put it inside a folder."""
    if key.startswith("/") or ".." in key.split("/"):
        raise DataError(f"{path}: key {key!r} leads out of the folder where it is unpacked: rename it")
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _classes(path: str) -> list[str] | None:
    try:
        return check_classes(path, read(path).decode().splitlines())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
