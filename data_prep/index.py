"""Writes the index of a folder of shards; ``python -m data_prep index`` does it for shards made by others."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.files import atomic_write, sync_folder
from data_prep.pool import ordered
from data_prep.scan import checksum, scan
from ummim.data.shards import (
    CLASSES,
    FORMAT,
    INDEX,
    JOURNAL,
    TABLE,
    UNLABELLED,
    Shard,
    read_classes,
    table_dtype,
)
from ummim.errors import DataError


def index(folder: Path, workers: int, ignore_labels: bool = False) -> str:
    """Scan every ``*.tar`` of ``folder``, by name, and write the index; returns a summary.

    Raises:
        DataError: no tars, an unfinished build, a shard that cannot be indexed, keys that come twice, or
            labels without a fitting class list. An index that was there stays.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        packed = next(folder.glob("*.tar.*"), None)
        found = f", but {packed.name}: unpack compressed tars first, they have no random access" if packed else ""
        raise DataError(f"{folder} holds no shards (*.tar){found}")
    if (folder / JOURNAL).exists():
        raise DataError(f"{folder} holds an unfinished build: run the same build again, it goes on where it was")
    jobs = ordered(partial(_examine, labels=not ignore_labels), paths, workers)
    found_shards = list(tqdm(jobs, "index", len(paths), unit="shard", disable=None))
    shards = [shard for shard, _ in found_shards]
    return write_index(folder, shards, [rows for _, rows in found_shards], None)


def write_index(folder: Path, shards: Sequence[Shard], rows: Sequence[np.ndarray], source: str | None) -> str:
    """Check the rows of all shards together and write table and index, the index last; returns a summary.

    ``source`` identifies the images and options of a build, so that the same build need not run twice.
    """
    width = max(array.dtype["key"].itemsize for array in rows)
    table = np.concatenate([array.astype(table_dtype(width)) for array in rows])
    table["shard"] = np.repeat(np.arange(len(rows)), [len(array) for array in rows])
    if not len(table):
        raise DataError(f"{folder}: its shards hold no samples")
    _check_unique(folder, shards, table)
    labelled = bool((table["label"] != UNLABELLED).any())
    if labelled:
        _check_labels(folder, shards, table)
    (folder / INDEX).unlink(missing_ok=True)  # never an index beside a table that is not its own
    with atomic_write(folder / TABLE) as file:
        np.lib.format.write_array(file, table, allow_pickle=False)
    content = {
        "format": FORMAT,
        "samples": len(table),
        "labelled": labelled,
        "source": source,
        "table_sha256": file_sha256(folder / TABLE),
        "shards": [asdict(replace(shard, samples=len(array))) for shard, array in zip(shards, rows, strict=True)],
    }
    sync_folder(folder)
    with atomic_write(folder / INDEX) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
    sync_folder(folder)
    noun = "shard" if len(shards) == 1 else "shards"
    megabytes = sum(shard.bytes for shard in shards) / 1e6
    return f"{len(table):,} samples in {len(shards):,} {noun}, {megabytes:,.1f} MB: {folder}"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _examine(path: Path, labels: bool) -> tuple[Shard, np.ndarray]:
    return checksum(path), scan(path, labels)


def _check_unique(folder: Path, shards: Sequence[Shard], table: np.ndarray) -> None:
    order = np.argsort(table["key"], kind="stable")
    again = np.flatnonzero(table["key"][order[1:]] == table["key"][order[:-1]])
    if again.size:
        a, b = (table[order[again[0] + i]] for i in (0, 1))
        raise DataError(
            f"{folder}: key {str(a['key'], 'utf-8')!r} is in {shards[a['shard']].name} at byte {a['offset']} "
            f"and in {shards[b['shard']].name} at byte {b['offset']} ({again.size} such keys): "
            "keys must be unique"
        )


def _check_labels(folder: Path, shards: Sequence[Shard], table: np.ndarray) -> None:
    classes = read_classes(folder)
    if classes is None:
        raise DataError(
            f"{folder / CLASSES} is missing, but the samples are labelled: write it (one class name a line, "
            f"in label order), or index without labels: python -m data_prep index --ignore-labels {folder}"
        )
    worst = table[int(np.argmax(table["label"]))]
    if worst["label"] >= len(classes):
        path, key = folder / shards[worst["shard"]].name, str(worst["key"], "utf-8")
        raise DataError(
            f"{path}: key {key!r} has label {worst['label']}, "
            f"but {CLASSES} names {len(classes)} classes (0 to {len(classes) - 1}): complete it"
        )
