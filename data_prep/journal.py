"""The journal of a build: what is done of it, one line for each finished shard."""

import fcntl
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.files import TEMPORARY
from ummim.data.shards import CLASSES, INDEX, JOURNAL, TABLE, Shard
from ummim.errors import DataError

QUARANTINE = "quarantine.jsonl"
_OWN_SHARD = re.compile(r"shard-\d{6,}\.tar")


@dataclass(frozen=True)
class Bad:
    """An image that cannot be read, and why."""

    file: str
    reason: str


class Journal:
    """Progress of a build: the first ``items_done`` items are in ``shards`` or in ``bad``.

    A line may be lost in a power cut, or outlive the name of its shard: then that shard is written again.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.items_done = 0
        self.shards: list[Shard] = []
        self.bad: list[Bad] = []
        self._path, self._descriptor = path, descriptor

    def begin(self, identity: str) -> None:
        os.ftruncate(self._descriptor, 0)
        self._write({"identity": identity})

    def resume(self, lines: list[dict]) -> None:
        """Take over the finished shards of ``lines``, as far as they are there."""
        self.begin(lines[0]["identity"])
        for line in lines[1:]:
            shard = Shard(**line["shard"]) if line["shard"] else None
            if shard and not _is_whole(self._path.parent / shard.name, shard.bytes):
                break
            self.add(shard, line["items_done"], [Bad(**bad) for bad in line["bad"]])

    def add(self, shard: Shard | None, items_done: int, bad: list[Bad]) -> None:
        """Note a finished shard, the items used up by then, and the bad ones since the last note."""
        entry = asdict(shard) if shard else None
        self._write({"shard": entry, "items_done": items_done, "bad": [asdict(entry) for entry in bad]})
        self.shards += [shard] if shard else []
        self.items_done = items_done
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
def claim(folder: Path, identity: str, overwrite: bool) -> Iterator[Journal]:
    """Make ``folder`` this build's own, continuing the same build (by ``identity``) where it was.

    Raises:
        DataError: ``folder`` holds shards and ``overwrite`` is not given, or another process builds there.
    """
    path = folder / JOURNAL
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{folder} is not a folder: give the shards one of their own") from None
    _refuse_others(folder, overwrite, unfinished=path.exists())
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process is building here: wait for it, or stop it") from None
        journal, lines = Journal(path, descriptor), _read(path)
        if lines and lines[0].get("identity") == identity and not overwrite:
            journal.resume(lines)
        else:
            if lines and not overwrite:
                print(f"{folder}: images or options have changed since the unfinished build: from the start",
                      file=sys.stderr)  # fmt: skip
            _clear(folder)
            journal.begin(identity)
        for leftover in folder.glob(f"*{TEMPORARY}"):
            leftover.unlink()
        yield journal
    finally:
        os.close(descriptor)


def _refuse_others(folder: Path, overwrite: bool, unfinished: bool) -> None:
    tars = sorted(path.name for path in folder.glob("*.tar"))
    foreign = [name for name in tars if not _OWN_SHARD.fullmatch(name)]
    if foreign:
        raise DataError(f"{folder} holds other tars ({foreign[0]}): build into another folder")
    if (tars or (folder / INDEX).exists()) and not unfinished and not overwrite:
        raise DataError(
            f"{folder} already holds the shards of other images or options: build into another folder, "
            "or replace them: --overwrite"
        )


def _clear(folder: Path) -> None:
    (folder / INDEX).unlink(missing_ok=True)  # first: from here on there is no dataset
    for name in (TABLE, CLASSES, QUARANTINE):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("*.tar"):
        path.unlink()


def _read(path: Path) -> list[dict]:
    """The journal's lines, up to one that was torn."""
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _is_whole(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size
