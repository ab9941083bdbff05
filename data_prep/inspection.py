"""``python -m data_prep inspect``: what a folder of shards holds, as text and as a contact sheet."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_prep.contact_sheet import SIDE, Cell, contact_sheet
from data_prep.histogram import bars, histogram
from data_prep.pool import ordered
from data_prep.scan import key_text
from ummim.atomic import atomic_write
from ummim.data.images import open_image, reason, to_rgb
from ummim.data.shards import UNLABELLED, ShardIndex, ShardReader
from ummim.errors import DataError
from ummim.seeds import sample_seed

SHEET = "inspect.png"
_BLOCK = 250  # images a worker takes at a time
_MANY = 24  # classes up to which each has its bar
_ENDS = 8  # of more classes: how many of the largest and of the smallest


class _Header(NamedTuple):
    """What an image's header says; ``width`` 0 if it is no image."""

    width: int
    height: int
    format: str


def inspect(location: str, out: Path | None, samples: int, seed: int | None, measure: int, workers: int) -> str:
    """Draw the contact sheet; returns a description of sizes, formats and classes.

    Args:
        location: folder of the shards with their index, or its URL.
        out: the sheet's PNG; None puts it beside the shards, or, of a URL, into the working folder.
        samples: pictures on the sheet, evenly spaced over the table, or drawn with ``seed``.
        measure: read the headers of at most so many images, evenly spaced.
        workers: processes.
    """
    index = ShardIndex.open(location)
    if not len(index):
        raise DataError(f"{index.place} holds no samples")
    out = out or (index.folder / SHEET if index.url is None else Path(SHEET))
    sheet = contact_sheet(list(_cells(index, _chosen(len(index), samples, seed))))
    with atomic_write(out) as file:
        sheet.save(file, "PNG")
    return "\n\n".join([*_description(index, measure, workers), f"contact sheet: {out}"])


def describe_sample(location: str, key: str) -> str:
    """Where a sample lies, and what it is, a line each.

    Raises:
        DataError: there is no such key.
    """
    index = ShardIndex.open(location)
    rows = np.flatnonzero(index.table["key"] == key.encode("utf-8", "surrogateescape"))
    if not rows.size:
        example = key_text(index.table["key"][0]) if len(index) else ""
        raise DataError(f"{index.place} has no sample with the key {key!r}; its keys look like {example!r}")
    row = int(rows[0])
    record = index.table[row]
    with closing(ShardReader(index)) as reader:
        data = reader.read(row)
    facts = {
        "key": key_text(record["key"]),
        "row": f"{row}",
        "shard": index.shards[int(record["shard"])].name,
        "offset": f"{record['offset']}",
        "length": f"{record['length']}",
        "label": _caption(index, int(record["label"])),
    }
    try:
        header = _header(data)
        facts["image"] = f"{header.format}, {header.width} x {header.height}"
        _thumbnail(data)
    except ValueError as error:
        facts["fault"] = f"the image cannot be decoded: {error}"
    return "\n".join(f"{name:7} {value}" for name, value in facts.items())


def _chosen(total: int, count: int, seed: int | None) -> list[int]:
    """``count`` rows of ``total`` (or all of them), in their order."""
    count = min(count, total)
    if seed is None:
        return [i * total // count for i in range(count)]
    generator = np.random.default_rng(sample_seed(seed, 0, "contact sheet"))
    return sorted(generator.choice(total, count, replace=False).tolist())


def _cells(index: ShardIndex, rows: list[int]) -> Iterator[Cell]:
    with closing(ShardReader(index)) as reader:
        for row in rows:
            key, caption = key_text(index.table["key"][row]), _caption(index, int(index.table["label"][row]))
            try:
                yield Cell(key, caption, _thumbnail(reader.read(row)))
            except (ValueError, DataError) as error:
                yield Cell(key, caption, None, str(error))


def _caption(index: ShardIndex, label: int) -> str:
    if label == UNLABELLED:
        return ""
    return _class(label, index.classes[label]) if index.classes and 0 <= label < len(index.classes) else f"{label}"


def _class(label: int, name: str) -> str:
    return name if name == f"{label}" else f"{label} {name}"


def _thumbnail(data: bytes) -> Image.Image:
    """The image shrunk to a cell, JPEGs decoded at a fitting scale; tiny ones enlarged by a whole number.

    Raises:
        ValueError: it cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_image(data)
            image.draft(None, (2 * SIDE, 2 * SIDE))
            picture = to_rgb(image)
            picture.thumbnail((SIDE, SIDE))
            factor = SIDE // max(picture.size)
            picture = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    except Exception as error:  # broken files make Pillow's plugins raise anything
        raise ValueError(reason(error)) from None
    return picture


def _header(data: bytes) -> _Header:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_image(data)
    except Exception as error:
        raise ValueError(reason(error)) from None
    return _Header(image.width, image.height, f"{image.format} {image.mode}")


def _headers(rows: list[int], index: ShardIndex) -> list[_Header]:
    found = []
    with closing(ShardReader(index)) as reader:
        for row in rows:
            try:
                found.append(_header(reader.read(row)))
            except (ValueError, DataError):
                found.append(_Header(0, 0, "unreadable"))
    return found


def _description(index: ShardIndex, measure: int, workers: int) -> Iterator[str]:
    """Paragraphs of text."""
    total = sum(shard.bytes for shard in index.shards)
    counts = np.diff(index.first)
    classes = f", {len(index.classes):,} classes" if index.classes is not None else ", unlabelled"
    yield (
        f"{index.place}: {len(index):,} samples in {len(index.shards):,} shards, {total / 1e6:,.1f} MB{classes}\n"
        f"samples a shard: {counts.min():,} to {counts.max():,}"
    )
    yield histogram("bytes an image, all", index.table["length"])
    rows = _chosen(len(index), measure, None)
    blocks = [rows[i : i + _BLOCK] for i in range(0, len(rows), _BLOCK)]
    headers: list[_Header] = []
    with tqdm(total=len(rows), desc="inspect", unit=" images", disable=None) as bar:
        for found in ordered(partial(_headers, index=index), blocks, workers):
            headers += found
            bar.update(len(found))
    of = "all" if len(rows) == len(index) else f"{len(rows):,} images evenly spaced"
    sizes = np.array([(header.width, header.height) for header in headers if header.width])
    if len(sizes):
        yield histogram(f"width in pixels, {of}", sizes[:, 0])
        yield histogram(f"height in pixels, {of}", sizes[:, 1])
        yield histogram(f"width / height, {of}", sizes[:, 0] / sizes[:, 1])
    formats = Counter(header.format for header in headers)
    yield bars(f"formats, {of}", dict(formats.most_common()))
    if index.classes is not None:
        yield _class_histogram(index, index.classes)


def _class_histogram(index: ShardIndex, names: list[str]) -> str:
    labels = index.table["label"]
    counts = np.bincount(labels[(labels >= 0) & (labels < len(names))], minlength=len(names))
    order = np.argsort(-counts, kind="stable").tolist()
    head = f"samples a class: {counts.min():,} to {counts.max():,}, median {np.median(counts):,.0f}"
    empty = int((counts == 0).sum())
    head += f", {empty:,} classes have none" if empty else ""
    shown = range(len(names)) if len(names) <= _MANY else order[:_ENDS] + order[-_ENDS:]
    if len(names) > _MANY:
        head += f"; the {_ENDS} largest and the {_ENDS} smallest"
    return bars(head, {_class(label, names[label]): int(counts[label]) for label in shown}, int(counts.sum()))
