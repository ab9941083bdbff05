"""CSV and JSONL lists of images: a column ``path`` (or ``image``), and ``label`` or ``class`` if there are labels."""

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence

from data_prep.locations import exists, read, size
from data_prep.sources.item import Item, Source, check_classes, make_key, number_labels
from ummim.data.shards import UNLABELLED
from ummim.data.urls import is_url, join, local_path, parent
from ummim.errors import DataError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
_PATHS = ("path", "image", "file_name", "url")  # names of the images' column, in order of preference

Row = Mapping[str, object]


def manifest_source(path: str, root: str | None, unlabelled: bool) -> Source:
    """The images that a manifest lists, in its order, their paths being relative to ``root`` (its own folder).

    ``label`` may hold numbers, which stay, or names, which are sorted and numbered; ``class`` holds names, beside
    a ``label`` of numbers those of the numbers. What one image has of the two, all must have. Images may be URLs.

    Raises:
        DataError: a manifest that cannot be read, a column that is missing, a path out of ``root`` or one that
            comes twice, or labels that are missing or contradict each other; with the line.
    """
    root = local_path(root or parent(path))
    if not exists(root):
        raise DataError(f"--root {root} does not exist")
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path} lists no images")
    column = next((name for name in _PATHS if name in rows[0][1]), None)
    if column is None:
        has = ", ".join(map(str, rows[0][1])) or "none"
        raise DataError(f"{path} has no column 'path' or 'image' (its columns: {has})")
    labels, classes = ([UNLABELLED] * len(rows), None) if unlabelled else _labels(path, rows)
    items, used = [], set[str]()
    lines: dict[str, int] = {}
    for (line, row), label in zip(rows, labels, strict=True):
        value = row.get(column)
        if not isinstance(value, str) or not value:
            raise DataError(f"{path}, line {line}: {column} is {value!r}, not the path of an image")
        location, name = locate(value, root, f"{path}, line {line}")
        if lines.setdefault(location, line) != line:
            raise DataError(f"{path}, line {line}: {value} is in line {lines[location]} already")
        items.append(Item(make_key(name, used), location, label, 0 if is_url(location) else size(location)))
    return Source(items, classes)


def _rows(path: str) -> Iterator[tuple[int, Row]]:
    """(line number, columns) of each row."""
    try:
        text = read(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if path.endswith((".csv", ".tsv")):
        delimiter = "\t" if path.endswith(".tsv") else ","
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        line = 0
        try:
            for row in reader:
                line = reader.line_num
                if None in row or None in row.values():
                    raise DataError(f"{path}, line {line}: not as many columns as the header has")
                yield line, row
        except csv.Error as error:  # a quotation mark may have swallowed any number of lines
            raise DataError(f"{path}, line {line + 1}: {error}: look for a stray quotation mark") from None
        return
    for number, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: no JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: {content[:60]} is no JSON object")
        yield number, row


def _labels(path: str, rows: Sequence[tuple[int, Row]]) -> tuple[list[int], list[str] | None]:
    label, name = (any(column in row for _, row in rows) for column in ("label", "class"))
    if not label and not name:
        return [UNLABELLED] * len(rows), None
    labels, classes = number_labels(f"{path}, column {'label' if label else 'class'}",
                                    _column(path, rows, "label" if label else "class"))  # fmt: skip
    if not (label and name):
        return labels, classes
    names: dict[int, str] = {}
    for (line, _), number, value in zip(rows, labels, _column(path, rows, "class"), strict=True):
        known = names.setdefault(number, str(value))
        if known != str(value):
            raise DataError(f"{path}, line {line}: label {number} is class {value!r} here, {known!r} further up")
    return labels, check_classes(path, [names.get(i, str(i)) for i in range(len(classes))])


def _column(path: str, rows: Sequence[tuple[int, Row]], column: str) -> list[str | int]:
    values: list[str | int] = []
    for line, row in rows:
        value = row.get(column)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise DataError(f"{path}, line {line}: {column} is {value!r}, not a number or a name: complete it, "
                            "or take the images without labels: --unlabelled")  # fmt: skip
        values.append(value)
    return values


def locate(value: str, root: str, where: str) -> tuple[str, str]:
    """(location, name for the key) of an image; a path has to lie below ``root``."""
    value = local_path(value)
    if is_url(value):
        return value, value.partition("://")[2].strip("/")
    base = posixpath.normpath(root) if not is_url(root) else root.rstrip("/")
    if is_url(root):
        inside = posixpath.normpath(value)
        found = join(base, inside)
        outside = inside.startswith(("/", "../"))
    else:
        found = posixpath.normpath(posixpath.join(base, value))
        inside = posixpath.relpath(found, base)
        outside = inside == ".." or inside.startswith("../")
    if outside:
        raise DataError(f"{where}: {value} lies outside {root}: name a folder that holds all images with --root")
    return found, inside
