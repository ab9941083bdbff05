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
from data_prep.scan import Rules, Survey, checksum, key_text, survey
from ummim.data.shards import CLASSES, FORMAT, INDEX, JOURNAL, TABLE, UNLABELLED, Shard, read_classes, table_dtype
from ummim.errors import DataError

_REMEDIES = {  # by kind of fault
    "tar": "restore the shard",
    "member": "mend the shard, name the image's extension (--image), or leave such samples out (--skip-incomplete)",
    "label": "mend it, or index without labels (--ignore-labels)",
    "key": "rename it, or take it out of the shard",
    "image": "take it out of the shard",
}


def index(folder: Path, workers: int, rules: Rules | None = None, recursive: bool = False) -> str:
    """Scan every ``*.tar`` of ``folder``, by name, and write the index; returns a summary.

    ``recursive`` takes the tars of the folders below as well.

    Raises:
        DataError: no tars, an unfinished build, a shard that cannot be indexed, keys that come twice, or
            labels without a fitting class list. An index that was there stays.
    """
    names = _shard_names(folder, recursive)
    if (folder / JOURNAL).exists():
        raise DataError(f"{folder} holds an unfinished build: run the same build again, it goes on where it was")
    rules = rules or Rules()
    jobs = ordered(partial(_examine, folder=folder, rules=rules), names, workers)
    found = list(tqdm(jobs, "index", len(names), unit=" shards", disable=None))
    surveys = [one for _, one in found]
    skipped = sum(one.skipped for one in surveys)
    if rules.labels:
        skipped += _complete_labels(folder, names, surveys, rules.skip_incomplete)
    shards, rows = [shard for shard, _ in found], [one.rows for one in surveys]
    notes = {
        "incomplete samples left out": skipped,
        "samples with several images, taken in the order of --image": sum(one.several for one in surveys),
        "members ignored (no extension, or a link)": sum(one.ignored for one in surveys),
    }
    summary = write_index(folder, shards, rows, None, rules)
    return summary + "".join(f"; {count:,} {note}" for note, count in notes.items() if count)


def write_index(
    folder: Path, shards: Sequence[Shard], rows: Sequence[np.ndarray], source: str | None, rules: Rules | None = None
) -> str:
    """Check the rows of all shards together and write table and index, the index last; returns a summary.

    ``source`` identifies the images and options of a build, so that the same build need not run twice;
    ``rules`` are those by which the rows were found, for ``verify``.
    """
    width = max(array.dtype["key"].itemsize for array in rows)
    table = np.empty(sum(map(len, rows)), table_dtype(width))
    first = np.cumsum([0, *map(len, rows)])
    for number, array in enumerate(rows):
        table[first[number] : first[number + 1]] = array
        table["shard"][first[number] : first[number + 1]] = number
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
        "rules": asdict(rules or Rules()),
        "table_sha256": file_sha256(folder / TABLE),
        "classes_sha256": file_sha256(folder / CLASSES) if labelled else None,
        "shards": [asdict(replace(shard, samples=len(array))) for shard, array in zip(shards, rows, strict=True)],
    }
    sync_folder(folder)
    with atomic_write(folder / INDEX) as file:
        file.write(sealed(content))
    sync_folder(folder)
    noun = "shard" if len(shards) == 1 else "shards"
    megabytes = sum(shard.bytes for shard in shards) / 1e6
    return f"{len(table):,} samples in {len(shards):,} {noun}, {megabytes:,.1f} MB: {folder}"


def sealed(content: dict) -> bytes:
    """The bytes of ``index.json``: ``content`` and the checksum of what stands before it."""
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps({**content, "index_sha256": digest}, indent=1).encode() + b"\n"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard_names(folder: Path, recursive: bool) -> list[str]:
    """Paths below ``folder`` of its tars, sorted."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no local folder: index shards where they lie, then copy the index beside them")
    names = _tars(folder, "**/*.tar" if recursive else "*.tar")
    if names:
        return names
    nested = _tars(folder, "**/*.tar")
    if nested:
        raise DataError(
            f"{folder} holds no shards itself, but {len(nested)} in folders below ({nested[0]}): "
            "index one of these, or all of them as one data set: --recursive"
        )
    packed = next(folder.glob("*.tar.*"), None)
    found = f", but {packed.name}: unpack compressed tars first, they have no random access" if packed else ""
    raise DataError(f"{folder} holds no shards (*.tar){found}")


def _tars(folder: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern) if not path.is_dir())


def _examine(name: str, folder: Path, rules: Rules) -> tuple[Shard, Survey]:
    path = folder / name
    try:
        found = survey(path, name, rules)
        if found.faults:
            fault, more = found.faults[0], len(found.faults) - 1
            others = f" ({more} more in this shard)" if more else ""
            raise DataError(f"{folder / str(fault)}{others}: {_REMEDIES[fault.kind]}")
        shard = checksum(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return replace(shard, name=name), found


def _complete_labels(folder: Path, names: list[str], surveys: list[Survey], skip: bool) -> int:
    """Where some samples have labels, leave out those that have none, or refuse them; returns their number."""
    counts = [int((found.rows["label"] == UNLABELLED).sum()) for found in surveys]
    missing = sum(counts)
    if missing == sum(len(found.rows) for found in surveys):
        return 0
    if missing and not skip:
        number = next(i for i, count in enumerate(counts) if count)
        rows = surveys[number].rows
        row = rows[int(np.argmax(rows["label"] == UNLABELLED))]
        raise DataError(
            f"{folder / names[number]}: key {key_text(row['key'])!r} at byte {row['offset']}: no label, but others "
            f"have one ({missing:,} such samples): leave them out (--skip-incomplete), or index without labels "
            "(--ignore-labels)"
        )
    for found in surveys:
        found.rows = found.rows[found.rows["label"] != UNLABELLED]
    return missing


def _check_unique(folder: Path, shards: Sequence[Shard], table: np.ndarray) -> None:
    pairs = repeated(table["key"])
    if len(pairs):
        a, b = table[pairs[0]]
        raise DataError(
            f"{folder}: key {key_text(a['key'])!r} is in {shards[a['shard']].name} at byte {a['offset']} "
            f"and in {shards[b['shard']].name} at byte {b['offset']} ({len(pairs):,} such keys), but a key decides "
            "its sample's crop and mask and must be unique: put the shards' names before all keys (--prefix-keys)"
        )


def repeated(keys: np.ndarray) -> np.ndarray:
    """(n, 2) int64: positions of each key that comes again, after the position of the one before it."""
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    return np.stack([order[again], order[again + 1]], axis=1)


def _check_labels(folder: Path, shards: Sequence[Shard], table: np.ndarray) -> None:
    classes = read_classes(folder)
    worst = table[int(np.argmax(table["label"]))]
    if classes is None:
        raise DataError(
            f"{folder / CLASSES} is missing, but the samples are labelled: write it (one class name a line, "
            f"in label order; numbers will do: seq 0 {worst['label']} > {folder / CLASSES}), or index without labels: "
            f"python -m data_prep index --ignore-labels {folder}"
        )
    if worst["label"] >= len(classes):
        raise DataError(
            f"{folder / shards[worst['shard']].name}: key {key_text(worst['key'])!r} has label {worst['label']}, "
            f"but {CLASSES} names {len(classes)} classes (0 to {len(classes) - 1}): complete it"
        )
