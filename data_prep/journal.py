"""The journal of a build: what is done of it, one line for each chunk of images whose shards are finished."""

import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_prep.occupied import QUARANTINE, SUMMARY, is_own_shard, refuse_others, refuse_sources
from data_prep.shard_writer import Finished
from data_prep.target import Target
from ummim.atomic import TEMPORARY
from ummim.data.locks import is_at
from ummim.data.shards import CLASSES, INDEX, JOURNAL, TABLE, Shard, table_dtype
from ummim.errors import DataError

_PATIENCE = 50  # tenths of a second that the lock is waited for


@dataclass(frozen=True)
class Bad:
    """An image that is left out, and why."""

    file: str
    reason: str


class AlreadyBuilt(Exception):
    """There is nothing to do; ``samples``: how many the finished build has."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.samples = samples


class Journal:
    """Progress of a build: the images of the first ``chunks`` chunks are in ``shards`` or in ``bad``.

    A line may be lost in a power cut, or outlive the name of its shard: then that chunk is packed again.
    """

    def __init__(self, target: Target, descriptor: int, head: dict, noted: list[dict]) -> None:
        """``head``: the first line; ``noted``: the others, of an earlier run, see ``take_over``."""
        self.chunks = 0
        self.shards: list[Finished] = []
        self.bad: list[Bad] = []
        self._target, self._descriptor, self._head, self._noted = target, descriptor, head, noted

    def begin(self) -> None:
        os.ftruncate(self._descriptor, 0)
        self._write(self._head)

    def take_over(self, left_out: Callable[[int, list[Finished], int], list[Bad] | None]) -> None:
        """Take over the chunks that an earlier run has finished, up to the first that has to be packed anew.

        That is one whose shards are not there any more, or of which ``left_out`` returns None: given its number, its
        shards and how many images were left out of it, it tells which ones are now.
        """
        sizes = self._target.sizes()
        kept: list[tuple[list[Finished], list[Bad]]] = []
        for number, line in enumerate(self._noted):
            shards = [_decoded(entry) for entry in line["shards"]]
            if any(sizes.get(entry.shard.name) != entry.shard.bytes for entry in shards):
                break
            bad = left_out(number, shards, len(line["bad"]))
            if bad is None:
                break
            kept.append((shards, bad))
        names = {entry.shard.name for shards, _ in kept for entry in shards}
        others = [name for name in sizes if is_own_shard(name) and name not in names]
        if others or len(kept) < len(self._noted):
            for name in [INDEX, *others]:  # the index first: from here on there is no dataset
                self._target.remove(name)
        self.begin()
        for shards, bad in kept:
            self.add(shards, bad)

    def add(self, shards: list[Finished], bad: list[Bad]) -> None:
        """Note the shards of a finished chunk, under their final names, and the images left out of it."""
        self._write({"shards": [_encoded(entry) for entry in shards], "bad": [asdict(entry) for entry in bad]})
        self.chunks += 1
        self.shards += shards
        self.bad += bad

    def finish(self) -> None:
        """The build is complete: remove the journal."""
        (self._target.folder / JOURNAL).unlink()

    def _write(self, content: dict) -> None:
        rest = memoryview(json.dumps(content).encode() + b"\n")
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            error.filename = str(self._target.folder / JOURNAL)
            raise


@contextmanager
def claim(target: Target, identity: str, overwrite: bool, sources: Collection[str]) -> Iterator[Journal]:
    """Make ``target`` this build's own, continuing the same build (by ``identity``) where it was.

    ``sources``: files, by path or URL, that the images are parts of.

    Raises:
        AlreadyBuilt: this build is finished, and ``overwrite`` is not given.
        DataError: ``target`` holds ``sources`` among its shards, or files of others and ``overwrite`` is not given, or
            another process builds there.
    """
    folder, path = target.folder, target.folder / JOURNAL
    descriptor = _acquire(target, identity, overwrite, sources)
    try:
        _tidy(folder)
        lines = _read(path)
        head = lines[0] if lines else {}
        if head.get("identity") == identity and (head.get("overwrite") or not overwrite):
            journal = Journal(target, descriptor, head, lines[1:])
        else:
            if lines and not overwrite:
                print(f"{target}: images or options have changed since the unfinished build: from the start",
                      file=sys.stderr)  # fmt: skip
            _clear(target)
            journal = Journal(target, descriptor, {"identity": identity, "overwrite": overwrite}, [])
            journal.begin()
        try:
            yield journal
        finally:
            if is_at(descriptor, path):  # else the build is finished, and the folder may be another's by now
                _tidy(folder)
    finally:
        os.close(descriptor)


def _acquire(target: Target, identity: str, overwrite: bool, sources: Collection[str]) -> int:
    """A descriptor of the journal, locked, where the build may begin or go on. Raises as ``claim`` does."""
    path = target.folder / JOURNAL
    while True:
        unfinished = path.exists()  # asked first: a build that ends now is found finished
        samples = None if overwrite else target.holds(identity)
        if samples is not None:
            raise AlreadyBuilt(samples)
        refuse_sources(target, sources)
        refuse_others(target, identity, overwrite, unfinished)
        descriptor = _locked(path, create=not unfinished)
        if descriptor is not None:
            return descriptor


def _locked(path: Path, create: bool) -> int | None:
    """A descriptor of the journal ``path``, locked; None if another build has ended and removed it meanwhile."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{folder} is not a folder: give the shards one of their own") from None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0), 0o644)
    except FileNotFoundError:
        return None
    try:
        _lock(folder, descriptor)
        if is_at(descriptor, path):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


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


def _tidy(folder: Path) -> None:
    """Remove what was not finished: by its name, for other programs have temporary files as well."""
    beside = "|".join(map(re.escape, (INDEX, TABLE, CLASSES, SUMMARY, QUARANTINE)))
    own = re.compile(rf"(chunk-\d{{6,}}-\d+\.tar({re.escape(TEMPORARY)})?|{beside}){re.escape(TEMPORARY)}")
    for path in folder.iterdir():
        if own.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
            path.unlink()


def _clear(target: Target) -> None:
    names = target.sizes()
    own = [name for name in names if name in (TABLE, CLASSES, QUARANTINE, SUMMARY) or is_own_shard(name)]
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
