"""Writes the index of a folder of shards; ``python -m data_prep index`` does it for shards made by others."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.fetched import local_file
from data_prep.index_place import indexed_place, shard_names
from data_prep.keys import repeated
from data_prep.pool import ordered
from data_prep.scan import Rules, Survey, checksum, key_text, survey
from ummim.atomic import atomic_write, sync_folder, write_bytes
from ummim.data.remote import Refused
from ummim.data.shards import CLASSES, FORMAT, INDEX, TABLE, UNLABELLED, Shard, read_classes, table_dtype
from ummim.data.urls import join, local_path, shown
from ummim.errors import DataError

_REMEDIES = {  # by kind of fault
    "tar": "restore the shard",
    "member": "mend the shard, name the image's extension (--image), or leave such samples out (--skip-incomplete)",
    "label": "mend it, or index without labels (--ignore-labels)",
    "key": "rename it, or take it out of the shard",
    "image": "take it out of the shard",
}


def index(
    location: str, workers: int, rules: Rules | None = None, recursive: bool = False, out: Path | None = None
) -> str:
    """Scan every ``*.tar`` of a folder, by name, and write the index; returns a summary.

    Args:
        location: the folder, or its URL: then each shard is copied to a temporary file while it is read.
        workers: processes.
        rules: what of the shards goes into the index.
        recursive: take the tars of the folders below as well.
        out: folder for the index of shards behind a URL; None: it is written beside them.

    Raises:
        DataError: no tars, an unfinished build, a shard that cannot be indexed, keys that come twice, labels
            without a fitting class list, or a place that the index cannot be written to. An index that was there stays.
    """
    rules, place = rules or Rules(), local_path(location).rstrip("/") or "/"
    with indexed_place(place, out) as target:
        names = shard_names(place, recursive)
        jobs = ordered(partial(_examine, place=place, rules=rules), names, workers)
        found = list(tqdm(jobs, "index", len(names), unit=" shards", disable=None))
        surveys = [one for _, one in found]
        skipped = sum(one.skipped for one in surveys)
        if rules.labels:
            skipped += _complete_labels(place, names, surveys, rules.skip_incomplete)
        shards, rows = [shard for shard, _ in found], [one.rows for one in surveys]
        notes = {
            "incomplete samples left out": skipped,
            "samples with several images, taken in the order of --image": sum(one.several for one in surveys),
            "members ignored (no extension, or a link)": sum(one.ignored for one in surveys),
        }
        del found, surveys
        url = place if out is not None else None
        summary = write_index(target.folder, shards, rows, None, rules, str(out or shown(place)), url)
        if target.url is not None:
            target.withdraw(INDEX)  # never an index beside a table that is not its own
            target.publish(TABLE)
            target.publish(INDEX)
    return summary + "".join(f"; {count:,} {note}" for note, count in notes.items() if count)


def write_index(
    folder: Path,
    shards: Sequence[Shard],
    rows: list[np.ndarray],
    source: str | None,
    rules: Rules | None = None,
    place: str | None = None,
    url: str | None = None,
) -> str:
    """Check the rows of all shards together and write table and index, the index last; returns a summary.

    Args:
        folder: where to.
        shards: in the order of the table; their counts of samples are taken from the rows.
        rows: of each shard; the list is emptied, for the table takes as much memory again.
        source: identifies the images and options of a build, so that the same build need not run twice.
        rules: those by which the rows were found, for ``verify``.
        place: the folder in messages.
        url: where the shards lie, if not in ``folder``.
    """
    place = place or str(folder)
    width = max(array.dtype["key"].itemsize for array in rows)
    first = np.cumsum([0, *map(len, rows)])
    table = np.empty(int(first[-1]), table_dtype(width))
    for number in reversed(range(len(rows))):
        table[first[number] : first[number + 1]] = rows.pop()
        table["shard"][first[number] : first[number + 1]] = number
    if not len(table):
        raise DataError(f"{place}: its shards hold no samples")
    _check_unique(place, shards, table)
    labelled = bool((table["label"] != UNLABELLED).any())
    if labelled:
        _check_labels(folder, place, shards, table)
    (folder / INDEX).unlink(missing_ok=True)  # never an index beside a table that is not its own
    with atomic_write(folder / TABLE) as file:
        np.lib.format.write_array(file, table, allow_pickle=False)
    counts = np.diff(first).tolist()
    content = {
        "format": FORMAT,
        "samples": len(table),
        "labelled": labelled,
        "source": source,
        "rules": asdict(rules or Rules()),
        "table_sha256": file_sha256(folder / TABLE),
        "classes_sha256": file_sha256(folder / CLASSES) if labelled else None,
        **({} if url is None else {"url": url}),
        "shards": [asdict(replace(shard, samples=count)) for shard, count in zip(shards, counts, strict=True)],
    }
    sync_folder(folder)
    write_bytes(folder / INDEX, sealed(content))
    sync_folder(folder)
    noun = "shard" if len(shards) == 1 else "shards"
    megabytes = sum(shard.bytes for shard in shards) / 1e6
    return f"{len(table):,} samples in {len(shards):,} {noun}, {megabytes:,.1f} MB: {place}"


def sealed(content: dict) -> bytes:
    """The bytes of ``index.json``: ``content`` and the checksum of what stands before it."""
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps({**content, "index_sha256": digest}, indent=1).encode() + b"\n"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _examine(name: str, place: str, rules: Rules) -> tuple[Shard, Survey]:
    where = f"{shown(place)}/{name}"
    try:
        with local_file(join(place, name)) as path:
            found = survey(path, name, rules)
            if found.faults:
                fault, more = found.faults[0], len(found.faults) - 1
                others = f" ({more} more in this shard)" if more else ""
                raise DataError(f"{shown(place)}/{fault}{others}: {_REMEDIES[fault.kind]}")
            shard = checksum(path)
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror}") from None
    except Refused as error:
        raise DataError(f"{where} cannot be had: {error}") from None
    return replace(shard, name=name), found


def _complete_labels(place: str, names: list[str], surveys: list[Survey], skip: bool) -> int:
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
            f"{shown(place)}/{names[number]}: key {key_text(row['key'])!r} at byte {row['offset']}: no label, but "
            f"others have one ({missing:,} such samples): leave them out (--skip-incomplete), or index without labels "
            "(--ignore-labels)"
        )
    for found in surveys:
        found.rows = found.rows[found.rows["label"] != UNLABELLED]
    return missing


def _check_unique(place: str, shards: Sequence[Shard], table: np.ndarray) -> None:
    pairs = repeated([table["key"]])
    if pairs:
        a, b = table[pairs[0].first[1]], table[pairs[0].again[1]]
        raise DataError(
            f"{place}: key {key_text(a['key'])!r} is in {shards[a['shard']].name} at byte {a['offset']} "
            f"and in {shards[b['shard']].name} at byte {b['offset']} ({len(pairs):,} such keys), but a key decides "
            "its sample's crop and mask and must be unique: put the shards' names before all keys (--prefix-keys)"
        )


def _check_labels(folder: Path, place: str, shards: Sequence[Shard], table: np.ndarray) -> None:
    classes = read_classes(folder)
    worst = table[int(np.argmax(table["label"]))]
    if classes is None:
        raise DataError(
            f"{place}/{CLASSES} is missing, but the samples are labelled: write it (one class name a line, "
            f"in label order; numbers will do: seq 0 {worst['label']} > {place}/{CLASSES}), or index without labels: "
            f"python -m data_prep index --ignore-labels {place}"
        )
    if worst["label"] >= len(classes):
        raise DataError(
            f"{place}/{shards[worst['shard']].name}: key {key_text(worst['key'])!r} has label {worst['label']}, "
            f"but {CLASSES} names {len(classes)} classes (0 to {len(classes) - 1}): complete it"
        )
