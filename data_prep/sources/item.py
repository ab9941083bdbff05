"""What a source is made of: images that a worker process can read by itself, and the names of their classes."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import NamedTuple

from ummim.data.shards import UNLABELLED
from ummim.errors import DataError


class Item(NamedTuple):
    """One image of a source.

    Attributes:
        key: its name in the shards, unique in the source.
        path: the file or URL that holds it.
        label: its class, or ``UNLABELLED``.
        size: bytes; of the file that holds it where its own are not known, 0 where nothing is.
        position: "range": offset in the file; "idx": number of the image; "parquet": row.
        kind: how it is read. "file": the whole file; "range": ``size`` bytes of it; "idx", "parquet": from a table;
            "none": a sample without an image.
        group: images of the same number lie in one Parquet row group and are read together; -1: each by itself.
    """

    key: str
    path: str
    label: int
    size: int
    position: int = -1
    kind: str = "file"
    group: int = -1

    @property
    def name(self) -> str:
        """Where the image lies, for messages."""
        if self.kind in ("range", "none"):
            return f"{self.path}: {self.key} at byte {self.position}"
        return self.path if self.kind == "file" else f"{self.path}[{self.position}]"


@dataclass(frozen=True)
class Source:
    """Items in the source's order, with unique keys; ``classes`` by label, or None without labels."""

    items: list[Item]
    classes: list[str] | None


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


def check_classes(where: str, classes: Sequence[str]) -> list[str]:
    """``classes`` as they can be listed one a line.

    Raises:
        DataError: a name holds a line break, or comes twice.
    """
    for name in classes:
        if name.splitlines() != [name]:
            raise DataError(f"{where}: the class {name!r} is empty or has a line break in its name: rename it")
    twice = {name for name in classes if classes.count(name) > 1} if len(set(classes)) < len(classes) else set()
    if twice:
        raise DataError(f"{where}: the class {min(twice)!r} comes twice: rename one")
    return [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in classes]


def number_labels(where: str, values: Sequence[str | int]) -> tuple[list[int], list[str]]:
    """(labels, class names) of a column. Whole numbers are labels as they are, named "0", "1", ...; anything else
    is a class name, numbered in the names' order.

    Raises:
        DataError: a number below 0 or beyond 31 bits, or a name that cannot be listed.
    """
    if all(isinstance(value, int) or re.fullmatch(r"-?\d{1,18}", value) for value in values):
        labels = [int(value) for value in values]
        for label in (min(labels), max(labels)):
            if not 0 <= label < 2**31:
                raise DataError(f"{where}: label {label} is not a number from 0 to {2**31 - 1}")
        if max(labels) > max(1000, 100 * len(labels)):
            raise DataError(
                f"{where}: label {max(labels)} among {len(labels)} images: labels number the classes from 0"
            )
        return labels, [str(i) for i in range(max(labels) + 1)]
    names = [str(value) for value in values]
    classes = sorted(set(names))
    number = {name: i for i, name in enumerate(classes)}
    return [number[name] for name in names], check_classes(where, classes)


def subset(source: Source, wanted: Sequence[str]) -> Source:
    """The items of the classes ``wanted``, labelled 0, 1, ... in its order.

    Raises:
        DataError: the source has no labels, or not these classes.
    """
    if source.classes is None:
        raise DataError("--classes: the images have no labels to choose by")
    check_classes("--classes", wanted)
    number = {name: i for i, name in enumerate(source.classes)}
    for name in wanted:
        if name not in number:
            near = difflib.get_close_matches(name, source.classes, 1)
            hint = f", did you mean {near[0]!r}?" if near else f": the source has {', '.join(source.classes[:5])}, ..."
            raise DataError(f"--classes: there is no class {name!r}{hint}")
    label = {number[name]: i for i, name in enumerate(wanted)}
    items = [item._replace(label=label[item.label]) for item in source.items if item.label in label]
    if not items:
        raise DataError(f"--classes: there are no images of {', '.join(wanted[:5])}")
    return Source(items, list(wanted))


def unlabel(items: list[Item]) -> Source:
    """The same items without their labels."""
    return Source([item._replace(label=UNLABELLED) for item in items], None)
