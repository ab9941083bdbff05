"""``python -m data_prep verify``: every fault of a folder of shards, by shard, key and offset."""

import os
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.index import file_sha256
from data_prep.pool import ordered
from data_prep.scan import checksum, scan
from ummim.data.images import decode
from ummim.data.shards import TABLE, ShardIndex
from ummim.errors import DataError


def verify(folder: Path, workers: int) -> str:
    """Check sizes, checksums, the table against the tars, keys, labels, and decode every image.

    Prints each fault on its own line; returns a summary when there is none.

    Raises:
        DataError: the index cannot be opened, or there were faults.
    """
    index = ShardIndex.open(folder)
    faults = _table_faults(index)
    numbers = range(len(index.shards))
    jobs = ordered(partial(_shard_faults, index), numbers, workers)
    for found in tqdm(jobs, "verify", len(numbers), unit="shard", disable=None):
        faults += found
    for fault in faults:
        print(fault)
    if faults:
        plural = "fault" if len(faults) == 1 else "faults"
        raise DataError(f"{folder}: {len(faults)} {plural}, listed above; restore the shards, or build them again")
    noun = "shard" if len(index.shards) == 1 else "shards"
    return f"{len(index):,} samples in {len(index.shards):,} {noun}, no fault: {folder}"


def _table_faults(index: ShardIndex) -> list[str]:
    faults = []
    if file_sha256(index.folder / TABLE) != index.table_sha256:
        faults.append(f"{TABLE}: its checksum is not the index's")
    _, first, counts = np.unique(index.table["key"], return_index=True, return_counts=True)
    faults += [
        f"{_place(index, int(row))}: the key comes {n} times" for row, n in zip(first, counts, strict=True) if n > 1
    ]
    limit = len(index.classes or [])
    if index.classes is not None:
        labels = index.table["label"]
        faults += [
            f"{_place(index, int(row))}: label {labels[row]} is not one of the {limit} classes"
            for row in np.flatnonzero(labels >= limit)
        ]
    return faults


def _shard_faults(index: ShardIndex, number: int) -> list[str]:
    shard = index.shards[number]
    path = index.folder / shard.name
    try:
        found = checksum(path)
    except OSError as error:
        return [f"{shard.name}: {error.strerror}"]
    faults = []
    if found.bytes != shard.bytes:
        faults.append(f"{shard.name}: {found.bytes} bytes, the index says {shard.bytes}")
    elif found.sha256 != shard.sha256:
        faults.append(f"{shard.name}: its checksum is not the index's")
    rows = range(int(index.first[number]), int(index.first[number + 1]))
    try:
        faults += _differences(index, rows, scan(path, labels=index.classes is not None))
    except DataError as error:
        faults.append(str(error).removeprefix(f"{index.folder}/"))
    with path.open("rb") as file:
        for row in rows:
            record = index.table[row]
            try:
                decode(os.pread(file.fileno(), int(record["length"]), int(record["offset"])))
            except ValueError as error:
                faults.append(f"{_place(index, row)}: the image cannot be decoded: {error}")
    return faults


def _differences(index: ShardIndex, rows: range, found: np.ndarray) -> list[str]:
    """Faults of the table's ``rows``, given what a scan of their shard has ``found``."""
    there = {record["key"]: record for record in found}
    faults = []
    for row in rows:
        record = index.table[row]
        actual = there.pop(record["key"], None)
        if actual is None:
            faults.append(f"{_place(index, row)}: not in the shard")
            continue
        for field in ("offset", "length", "label"):
            if record[field] != actual[field]:
                faults.append(f"{_place(index, row)}: {field} is {actual[field]}, the index says {record[field]}")
    name = index.shards[int(index.table["shard"][rows.start])].name if rows else ""
    for key, actual in there.items():
        faults.append(f"{name}: key {str(key, 'utf-8')!r} at byte {actual['offset']}: not in the index")
    return faults


def _place(index: ShardIndex, row: int) -> str:
    record = index.table[row]
    return f"{index.shards[record['shard']].name}: key {index.key(row)!r} at byte {record['offset']}"
