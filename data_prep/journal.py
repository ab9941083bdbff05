"""The journal of a build: what is done of it, one line for each chunk of images whose shards are finished."""

import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_prep.shard_writer import Finished
from data_prep.target import Target
from ummim.atomic import TEMPORARY
from ummim.data.shards import CLASSES, INDEX, JOURNAL, TABLE, Shard, table_dtype
from ummim.errors import DataError

QUARANTINE = "quarantine.jsonl"
SUMMARY = "summary.json"
_PATIENCE = 50  # tenths of a second that the lock is waited for
_OWN_SHARD = re.compile(r"shard-\d{6,}\.tar")


@dataclass(frozen=True)
class Bad:
    """An image that is left out, and why."""

    file: str
    reason: str


class Journal:
    """Progress of a build: the images of the first ``chunks`` chunks are in ``shards`` or in ``bad``.

    A line may be lost in a power cut, or outlive the name of its shard: then that chunk is packed again.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.chunks = 0
        self.shards: list[Finished] = []
        self.bad: list[Bad] = []
        self._path, self._descriptor = path, descriptor

    def begin(self, identity: str) -> None:
        os.ftruncate(self._descriptor, 0)
        self._write({"identity": identity})

    def resume(self, lines: list[dict], sizes: dict[str, int]) -> None:
        """Take over the finished chunks of ``lines``, as far as their shards are there (``sizes``, bytes by name)."""
        self.begin(lines[0]["identity"])
        for line in lines[1:]:
            shards = [_decoded(entry) for entry in line["shards"]]
            if any(sizes.get(entry.shard.name) != entry.shard.bytes for entry in shards):
                break
            self.add(shards, [Bad(**bad) for bad in line["bad"]])

    def add(self, shards: list[Finished], bad: list[Bad]) -> None:
        """Note the shards of a finished chunk, under their final names, and the images left out of it."""
        self._write({"shards": [_encoded(entry) for entry in shards], "bad": [asdict(entry) for entry in bad]})
        self.chunks += 1
        self.shards += shards
        self.bad += bad

    def finish(self) -> None:
        """The build is complete: remove the journal."""
        self._path.unlink()

    def _write(self, content: dict) -> None:
        rest = memoryview(json.dumps(content).encode() + b"\n")
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            error.filename = str(self._path)
            raise


@contextmanager
def claim(target: Target, identity: str, overwrite: bool) -> Iterator[Journal]:
    """Make ``target`` this build's own, continuing the same build (by ``identity``) where it was.

    Raises:
        DataError: ``target`` holds shards and ``overwrite`` is not given, or another process builds there.
    """
    folder = target.folder
    path = folder / JOURNAL
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{folder} is not a folder: give the shards one of their own") from None
    _refuse_others(target, overwrite, unfinished=path.exists())
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        _lock(folder, descriptor)
        _tidy(folder)
        journal, lines = Journal(path, descriptor), _read(path)
        if lines and lines[0].get("identity") == identity and not overwrite:
            journal.resume(lines, target.sizes())
        else:
            if lines and not overwrite:
                print(f"{target}: images or options have changed since the unfinished build: from the start",
                      file=sys.stderr)  # fmt: skip
            _clear(target)
            journal.begin(identity)
        try:
            yield journal
        finally:
            _tidy(folder)
    finally:
        os.close(descriptor)


def _lock(folder: Path, descriptor: int) -> None:
    """The workers of a build that was killed share its lock; they end in no time, but may still be ending."""
    for attempt in range(_PATIENCE + 1):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt == _PATIENCE:
                raise DataError(f"{folder}: another process is building here: wait for it, or stop it") from None
            time.sleep(0.1)


def _refuse_others(target: Target, overwrite: bool, unfinished: bool) -> None:
    names = target.sizes()
    tars = sorted(name for name in names if name.endswith(".tar"))
    foreign = [name for name in tars if not _OWN_SHARD.fullmatch(name)]
    if foreign:
        raise DataError(f"{target} holds other tars ({foreign[0]}): build into another folder")
    if (tars or INDEX in names) and not unfinished and not overwrite:
        lost = (
            "" if target.url is None else f", or those of a build whose journal is not in {target.folder} (--staging)"
        )
        raise DataError(
            f"{target} already holds the shards of other images or options{lost}: build into another folder, "
            "or replace them: --overwrite"
        )


def _tidy(folder: Path) -> None:
    """Remove what was not finished."""
    for leftover in folder.glob(f"*{TEMPORARY}"):
        leftover.unlink()


def _clear(target: Target) -> None:
    names = target.sizes()
    own = [name for name in names if name in (TABLE, CLASSES, QUARANTINE, SUMMARY) or _OWN_SHARD.fullmatch(name)]
    for name in [INDEX, *own]:  # the index first: from here on there is no dataset
        target.remove(name)


def _read(path: Path) -> list[dict]:
    """The journal's lines, up to one that was torn."""
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _encoded(entry: Finished) -> dict:
    columns = {name: entry.rows[name].tolist() for name in ("offset", "length", "label")}
    keys = [str(key, "utf-8") for key in entry.rows["key"]]
    return {**asdict(entry.shard), "key": keys, **columns, "sizes": entry.sizes.tolist(), "kinds": entry.kinds}


def _decoded(entry: dict) -> Finished:
    keys = [key.encode() for key in entry["key"]]
    rows = np.zeros(len(keys), table_dtype(max(map(len, keys))))
    rows["key"] = keys
    for name in ("offset", "length", "label"):
        rows[name] = entry[name]
    shard = Shard(**{name: entry[name] for name in Shard.__dataclass_fields__})
    return Finished(shard, rows, np.array(entry["sizes"], np.uint32), entry["kinds"])
