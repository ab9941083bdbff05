"""Copies of whole shards on the node's own disk, shared by all its processes, least recently used out first.

shards/SHA256.tar        a shard, whole and checked when it came; named by its content, so it is never out of date
shards/SHA256-SIZE.part  as much of it as has come, its whole size reserved; the next attempt goes on from there
shards/SHA256.lock       held (flock) by the one process that fetches it; gone with it
failed/                  what could not be had, so that the node's other processes need not wait for it as well
indices/                 copies of remote indices, see ``ummim.data.index_files``

A process may be killed at any moment: the kernel releases its locks, and only whole files are named .tar.
"""

import errno
import hashlib
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ummim.data.download import Patience, download, gave_up
from ummim.data.faults import SourceDown
from ummim.data.locks import locked
from ummim.data.remote import Interrupted, Refused, file_size
from ummim.data.urls import beside, shown
from ummim.errors import DataError

_UNITS = {"": 1, "B": 1} | {f"{p}{b}B": n**i for i, p in enumerate("KMGT", 1) for b, n in (("", 1000), ("I", 1024))}
DEFAULT_SIZE = "100GB"
_AGAIN_SECONDS = 60.0  # at least, before a shard that could not be had is asked for again
_PROBE = "index.json"  # lies beside the shards; who answers for it, if only that it is not there, is not down
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _NoRoom(Exception):
    """Only by evicting what is needed sooner."""


def parse_size(text: str) -> int:
    """Bytes of a size such as 100GB, 1.5TB, 512MiB or 1000. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is no size")
    return int(float(match[1]) * unit)


def default_folder() -> Path:
    """Of this user, below the system's folder for temporary files.

    Raises:
        DataError: somebody else has made it.
    """
    folder = Path(tempfile.gettempdir()) / f"ummim-cache-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise DataError(f"{folder} is another user's: set data.cache to a folder of your own on this machine's disk")
    return folder


def default_cache() -> "ShardCache":
    return ShardCache(default_folder(), parse_size(DEFAULT_SIZE))


@dataclass(frozen=True)
class ShardCache:
    """A folder of copies. Cheap to pass to other processes; all that use a folder should agree on its limit.

    Attributes:
        folder: on a disk of this node.
        limit: bytes that the shards' copies may take, unfinished ones counted as whole.
        retry_seconds: how long to go on asking a server without any progress.
        job: of this launch; failures that another one has met do not count.
    """

    folder: Path
    limit: int
    retry_seconds: float = 300.0
    job: str = field(default_factory=lambda: secrets.token_hex(8))

    def path(self, sha256: str) -> Path:
        """Where the copy of the shard with this checksum is, or would be."""
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise DataError(f"{sha256!r} is no SHA-256: the index is damaged: make it again: python -m data_prep index")
        return self.folder / "shards" / f"{sha256}.tar"

    def open(self, location: str, sha256: str, size: int) -> int:
        """A file descriptor of a shard's copy, which stays readable when the copy is evicted; waits until it is here.

        Args:
            location: where the shard lies, a path or URL.
            sha256, size: its checksum (hex) and bytes.

        Raises:
            DataError: it cannot be had (for some time, the next reading of it fails at once), or there is no room
                for it. ``SourceDown`` if nothing can be had from where it lies.
        """
        target = self.path(sha256)
        try:
            while True:
                descriptor = _open_whole(target, size)
                if descriptor is not None:
                    return descriptor
                with locked(target.with_suffix(".lock")):
                    if not target.exists():
                        return self._copy(location, sha256, size, self._patience(location, sha256))
        except OSError as error:
            raise self.unusable(error) from None

    def prefetch(
        self, location: str, sha256: str, size: int, keep: Collection[Path], stopped: Callable[[], bool]
    ) -> bool:
        """Whether the shard is here now, after one attempt. False also if another process is at it, or if there is
        no room without evicting a file of ``keep``. Raises ``Stopped`` soon after ``stopped()`` has become true."""
        target = self.path(sha256)
        try:
            if target.exists():
                return True
            if self._failure(sha256) is not None:
                return False
            with locked(target.with_suffix(".lock"), wait=False) as held:
                if held and not target.exists():
                    os.close(self._copy(location, sha256, size, Patience(0, stopped), keep))
                return held
        except (DataError, OSError, _NoRoom):
            return False  # whoever needs it will say so

    def touch(self, sha256: str) -> None:
        """Count the copy, if there is one, as just used."""
        with suppress(OSError):
            os.utime(self.path(sha256))

    def _copy(
        self, location: str, sha256: str, size: int, patience: Patience, keep: Collection[Path] | None = None
    ) -> int:
        """Fetch what is not here; whoever calls holds its lock. ``keep``: not to be evicted, and do not wait."""
        part = self.path(sha256).with_name(f"{sha256}-{size}.part")
        try:
            self._admit(part, size, keep)
            descriptor = download(location, part, sha256, size, patience, lambda f, data: self.write(f, data, keep))
        except Refused as error:
            part.unlink(missing_ok=True)
            failure = DataError(f"{shown(location)}: {error}: put the shard back there, or index again what is left")
            self._remember(sha256, failure)
            raise failure from None
        except Interrupted as error:
            message = gave_up(location, str(error), patience)
            if keep is not None:
                raise DataError(message) from None
            failure = DataError(message) if self._answers(location) else SourceDown(message)
            self._remember(sha256, failure)
            if isinstance(failure, SourceDown):
                self._remember(_folder(location), failure)
            raise failure from None
        except OSError:
            part.unlink(missing_ok=True)
            raise
        os.fsync(descriptor)
        with self._all_locked():  # else who counts the files at this moment might see neither
            part.replace(self.path(sha256))
        self._note(sha256).unlink(missing_ok=True)
        self._note(_folder(location)).unlink(missing_ok=True)
        return descriptor

    def write(self, descriptor: int, data: bytes, keep: Collection[Path] | None = None) -> None:
        """Write all of ``data``; while the disk is full, evict shards. Raises OSError when there are none left."""
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(descriptor, left) :]
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                with self._all_locked():
                    if not _evict(self._files(), 1, keep or ()):
                        raise

    def _admit(self, part: Path, size: int, keep: Collection[Path] | None) -> None:
        """Make room for a shard and reserve it, by a part file of its name."""
        if size > self.limit:
            raise DataError(f"data.cache_size is {self.limit} bytes, but one shard takes {size}: raise it")
        while not part.exists():
            with self._all_locked():
                files = self._files()
                surplus = sum(bytes_ for _, bytes_, _ in files) + size - self.limit
                if _evict(files, surplus, keep or ()) >= surplus:
                    part.touch()
                    return
            if keep is not None:
                raise _NoRoom
            time.sleep(0.1)  # until one of the shards that are being fetched is whole

    def _all_locked(self) -> AbstractContextManager[bool]:
        return locked(self.folder / "shards" / "all.lock")

    def _files(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of all copies and parts, the least recently used first."""
        files = []
        for entry in os.scandir(self.folder / "shards"):
            with suppress(FileNotFoundError):
                if entry.name.endswith(".tar"):
                    files.append((entry.stat().st_mtime, entry.stat().st_size, Path(entry.path)))
                elif match := re.fullmatch(r"[0-9a-f]+-(\d+)\.part", entry.name):
                    files.append((entry.stat().st_mtime, int(match[1]), Path(entry.path)))
        return sorted(files)

    def _patience(self, location: str, sha256: str) -> Patience:
        """For how long to try. Raises the error that a process of this job has met lately."""
        failure = self._failure(sha256)
        if failure is None and self._failure(_folder(location)) is None:
            return Patience(self.retry_seconds)
        if failure is not None and failure[1] < max(self.retry_seconds, _AGAIN_SECONDS):
            raise failure[0]
        return Patience(0)  # somebody has waited long enough: see whether it works again

    def _answers(self, location: str) -> bool:
        """Whether the place that a shard lies in answers at all."""
        try:
            file_size(beside(location, _PROBE), Patience(0).stall)
        except Interrupted:
            return False
        except Refused:
            pass
        return True

    def _note(self, name: str) -> Path:
        return self.folder / "failed" / hashlib.sha256(name.encode()).hexdigest()[:32]

    def _failure(self, name: str) -> tuple[DataError, float] | None:
        """The failure of a shard or place that a process of this job has met, and seconds since."""
        note = self._note(name)
        try:
            job, kind, message = note.read_text().split("\n", 2)
            age = time.time() - note.stat().st_mtime
        except (FileNotFoundError, ValueError):
            return None
        error = SourceDown(message) if kind == SourceDown.__name__ else DataError(message)
        return (error, age) if job == self.job else None

    def _remember(self, name: str, error: DataError) -> None:
        note = self._note(name)
        note.parent.mkdir(exist_ok=True)
        note.write_text(f"{self.job}\n{type(error).__name__}\n{error}")

    def unusable(self, error: OSError) -> DataError:
        if error.errno in _FULL:
            return DataError(
                f"disk full while writing below {self.folder}, and no shard is left there to evict: free some space, "
                "or set data.cache to a folder on a larger disk"
            )
        return DataError(
            f"{error.filename or self.folder}: {error.strerror}: set data.cache to a folder on this machine's disk "
            "that you can write to"
        )


def _folder(location: str) -> str:
    return shown(location).rpartition("/")[0]


def _open_whole(path: Path, size: int) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size != size:  # a power cut, say
        path.unlink(missing_ok=True)
        os.close(descriptor)
        return None
    os.utime(descriptor)
    return descriptor


def _evict(files: list[tuple[float, int, Path]], surplus: int, keep: Collection[Path]) -> int:
    """Remove files, the least recently used first, until ``surplus`` bytes are gone; returns how many are."""
    gone = 0
    for _, size, path in files:
        if gone >= surplus:
            break
        if path in keep:
            continue
        if path.suffix == ".part":
            with locked(path.with_name(path.name.partition("-")[0] + ".lock"), wait=False) as held:
                if not held:
                    continue  # somebody is fetching it
                path.unlink(missing_ok=True)
        else:
            path.unlink(missing_ok=True)
        gone += size
    return gone
