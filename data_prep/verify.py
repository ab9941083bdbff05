"""``python -m data_prep verify``: every fault of a folder of shards, by shard, key and offset."""

import hashlib
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_prep.expectation import Expectation, read_expectation
from data_prep.fetched import local_file, local_index
from data_prep.keys import repeated
from data_prep.pool import ordered
from data_prep.scan import Rules, key_text, survey
from data_prep.tar import Fault
from ummim.data.images import open_image, reason, to_rgb
from ummim.data.remote import Refused
from ummim.data.shards import UNLABELLED, Shard
from ummim.data.urls import is_url, join, local_path, shown
from ummim.errors import DataError


class _Job(NamedTuple):
    """A shard to check, and what is expected of it (None: nothing is known)."""

    location: str  # path or URL
    name: str
    shard: Shard | None
    rows: np.ndarray | None  # of the table
    rules: Rules
    labelled: bool
    classes: int | None
    fast: bool


class _Result(NamedTuple):
    faults: list[Fault]
    extra: np.ndarray | None  # rows of the shard that are not in the table
    lost: np.ndarray | None  # which of the table's rows are not in the shard
    samples: int
    decoded: int


def verify(location: str, workers: int, fast: bool = False, as_json: bool = False) -> str:
    """Check index, table and class list, and of every shard its size, checksum, members, keys, labels and images.

    Goes on after a fault, also within a damaged tar. Prints each fault on its own line when it is found (or, with
    ``as_json``, all at the end as one object); returns a summary when there is none.

    Args:
        location: the shards' folder, or its URL: then each shard is copied to a temporary file first.
        workers: processes.
        fast: look into a shard only where its size or checksum differs, and decode no image.

    Raises:
        DataError: there were faults, or nothing to check.
    """
    started = time.monotonic()
    place = local_path(location)
    if not is_url(place) and not Path(place).is_dir():
        raise DataError(f"{place} is no folder of shards: build one: python -m data_prep build SRC {place}")
    results: list[_Result] = []
    with local_index(place) as folder:
        expected = read_expectation(folder)
        jobs, faults = _jobs(expected.url or place, expected, fast)
        say = _silence if as_json else _print
        say(faults)
        for result in tqdm(ordered(_check, jobs, workers), "verify", len(jobs), unit=" shards", disable=None):
            say(result.faults)
            faults += result.faults
            results.append(result)
        twice = _twice(jobs, results)
    say(twice)
    faults += twice
    samples, decoded = sum(one.samples for one in results), sum(one.decoded for one in results)
    if as_json:
        head = {"folder": shown(place), "shards": len(jobs), "samples": samples, "images_decoded": decoded}
        print(json.dumps({**head, "faults": [asdict(fault) for fault in faults]}, indent=1))
    checked = f"{samples:,} samples in {len(jobs):,} {'shard' if len(jobs) == 1 else 'shards'}"
    if faults:
        raise DataError(f"{shown(place)}: {_counted(faults)} in {checked}, listed above: {_remedy(place)}")
    if as_json:
        return ""
    seconds = time.monotonic() - started
    speed = f"{decoded:,} images decoded, {decoded / seconds:,.0f} images/s" if decoded else "no image decoded"
    return f"{checked}, no fault: {shown(place)} ({seconds:.1f} s, {speed})"


def _counted(faults: list[Fault]) -> str:
    kinds = Counter(fault.kind for fault in faults)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    return f"{len(faults):,} {'fault' if len(faults) == 1 else 'faults'} ({counts})"


def _remedy(place: str) -> str:
    if is_url(place):
        return "restore the files"
    return f"restore the files, build again, or index what is sound: python -m data_prep index {place}"


def _silence(faults: list[Fault]) -> None:
    """For a report that is printed at its end."""


def _print(faults: list[Fault]) -> None:
    for fault in faults:
        tqdm.write(str(fault).encode("utf-8", "backslashreplace").decode(), file=sys.stdout)


def _jobs(place: str, expected: Expectation, fast: bool) -> tuple[list[_Job], list[Fault]]:
    """What to check shard by shard, and the faults seen so far."""
    common = (expected.rules, expected.labelled, expected.classes, fast)
    there = set() if is_url(place) else _tars(Path(place), expected.shards or [])
    if expected.shards is None:
        if not there:
            raise DataError(f"{shown(place)} holds neither shards (*.tar) nor an index ({expected.faults[-1]})")
        return [_Job(join(place, name), name, None, None, *common) for name in sorted(there)], list(expected.faults)
    jobs, first = [], 0
    for shard in expected.shards:
        rows = None if expected.table is None else np.asarray(expected.table[first : first + shard.samples])
        jobs.append(_Job(join(place, shard.name), shard.name, shard, rows, *common))
        first += shard.samples
    extra = sorted(there - {shard.name for shard in expected.shards})
    return jobs, expected.faults + [Fault(name, "shard", "is not in the index") for name in extra]


def _tars(folder: Path, shards: list[Shard]) -> set[str]:
    """Every tar in ``folder``, and in the folders below it where there are ``shards``."""
    folders = {(folder / shard.name).parent for shard in shards} | {folder}
    return {path.relative_to(folder).as_posix() for parent in folders for path in parent.glob("*.tar")}


def _check(job: _Job) -> _Result:
    """Everything about one shard; the faults in the order of their offsets."""
    try:
        with local_file(job.location) as path:
            return _check_file(job, path)
    except FileNotFoundError:
        reason = "is missing"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except Refused as error:
        reason = f"cannot be had: {error}"
    lost = None if job.rows is None else np.ones(len(job.rows), bool)
    return _Result([*_label_faults(job), Fault(job.name, "shard", reason)], None, lost, 0, 0)


def _check_file(job: _Job, path: Path) -> _Result:
    faults = list(_label_faults(job))
    changed = _file_fault(job, path)
    if job.fast and job.shard is not None and changed is None:
        return _Result(faults, None, None, job.shard.samples, 0)
    found = survey(path, job.name, job.rules, job.labelled)
    faults += [changed] if changed else []
    faults += found.faults
    extra, lost = found.rows, None
    if job.rows is not None:
        differing, extra, lost = _differences(job.name, job.rows, found.rows)
        faults += differing
    if not job.fast:
        faults += _image_faults(job, path, found.rows)
    faults.sort(key=lambda fault: -1 if fault.byte is None else fault.byte)
    return _Result(faults, extra, lost, len(found.rows), 0 if job.fast else len(found.rows))


def _file_fault(job: _Job, path: Path) -> Fault | None:
    """Another size or checksum than the index says."""
    shard = job.shard
    if shard is None:
        return None
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != shard.bytes:
            what = "truncated" if size < shard.bytes else "not the shard that was indexed"
            return Fault(job.name, "shard", f"{what}: {size} bytes, the index says {shard.bytes}")
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            return Fault(job.name, "shard", "its checksum is not the index's")
    return None


def _label_faults(job: _Job) -> Iterator[Fault]:
    if job.rows is None:
        return
    labels = job.rows["label"]
    wrong = (labels < 0) if job.labelled else (labels != UNLABELLED)
    if job.classes is not None:
        wrong = wrong | (labels >= job.classes)
    for row in job.rows[wrong]:
        what = f"is not one of the {job.classes} classes" if job.labelled else "though the data is unlabelled"
        yield _fault(job.name, "label", f"label {row['label']} {what}", row)


def _differences(name: str, rows: np.ndarray, found: np.ndarray) -> tuple[list[Fault], np.ndarray, np.ndarray]:
    """Compare the table's ``rows`` with those ``found`` in the shard: faults, rows not in the table, and a mask
    of the table's rows that are not in the shard."""
    there = {row["key"]: i for i, row in enumerate(found)}
    faults, lost, unknown = [], np.zeros(len(rows), bool), np.ones(len(found), bool)
    for i, row in enumerate(rows):
        match = there.get(row["key"])
        if match is None:
            lost[i] = True
            faults.append(_fault(name, "member", "in the index, but not in the shard", row))
            continue
        unknown[match] = False
        for part in ("offset", "length", "label"):
            if row[part] != found[match][part]:
                reason = f"its {part} is {found[match][part]}, the index says {row[part]}"
                faults.append(_fault(name, "index", reason, row))
    faults += [_fault(name, "index", "not in the index", row) for row in found[unknown]]
    return faults, found[unknown], lost


def _image_faults(job: _Job, path: Path, rows: np.ndarray) -> Iterator[Fault]:
    with path.open("rb") as file:
        for row in rows:
            complaint = _undecodable(os.pread(file.fileno(), int(row["length"]), int(row["offset"])))
            if complaint:
                yield _fault(job.name, "image", f"the image cannot be decoded: {complaint}", row)


def _undecodable(data: bytes) -> str:
    """Why an image cannot be decoded; empty if it can. JPEGs are read in full, but at an eighth of their size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_image(data)
            image.draft(None, (1, 1))
            to_rgb(image)
    except Exception as error:  # broken files make Pillow's plugins raise anything
        return reason(error)
    return ""


def _twice(jobs: list[_Job], results: list[_Result]) -> list[Fault]:
    """Keys that are there twice, in one shard or in two: in the table as far as it is right, and beside it."""
    parts: list[np.ndarray] = []
    numbers: list[int] = []  # of the parts' shards
    for number, (job, result) in enumerate(zip(jobs, results, strict=True)):
        rows = job.rows
        if rows is not None and result.lost is not None and result.lost.any():
            rows = rows[~result.lost]
        found = [part for part in (rows, result.extra) if part is not None]
        parts += found
        numbers += [number] * len(found)
    faults = []
    for first, again in repeated([part["key"] for part in parts]):
        earlier, later = parts[first[0]][first[1]], parts[again[0]][again[1]]
        where = f"{jobs[numbers[first[0]]].name} at byte {earlier['offset']}"
        reason = f"the key is also in {where}: keys must be unique"
        faults.append(_fault(jobs[numbers[again[0]]].name, "key", reason, later))
    return faults


def _fault(name: str, kind: str, reason: str, row: np.void) -> Fault:
    return Fault(name, kind, reason, key_text(row["key"]), int(row["offset"]))
