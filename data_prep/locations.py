"""Listing and reading of sources by path or URL, on top of ``ummim.data.remote``: tried again while there is hope."""

import errno
import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

from ummim.data.download import Patience, fetch_file, fetch_range, persist
from ummim.data.remote import Missing, Refused, file_size, filesystem, fsspec_errors, serves_parts
from ummim.data.urls import is_url, is_web, shown
from ummim.errors import DataError

Value = TypeVar("Value")
PATIENCE_SECONDS = 60.0  # without progress, after which a server is given up
_READ_AHEAD = 2**18


def exists(location: str) -> bool:
    if not is_url(location):
        return Path(location).exists()
    if is_web(location):
        return _is_there(location, lambda: file_size(location, patience().stall))
    fs, path = connect(location)
    return _is_there(location, lambda: fs.info(path))


def is_folder(location: str) -> bool:
    if not is_url(location):
        return Path(location).is_dir()
    if is_web(location):  # fsspec takes every page with links for a folder
        return location.endswith("/")
    fs, path = connect(location)
    return attempt(location, lambda: fs.isdir(path))


def read(location: str, start: int | None = None, length: int = 0) -> bytes:
    """The content of a file, or ``length`` bytes of it from ``start``.

    Raises:
        OSError: a local file that cannot be read, or is none (a pipe, say); a remote one that is not there or refused.
        DataError: a server that does not answer, or a file that ends before the last byte.
    """
    if not is_url(location):
        with _open_file(location) as file:
            data = file.readall() if start is None else os.pread(file.fileno(), length, start)
    elif start is None:
        data = _told(location, lambda: fetch_file(location, patience()))
    else:
        data = _told(location, lambda: fetch_range(location, start, length, patience()))
    if start is not None and len(data) != length:
        raise DataError(f"{shown(location)}: {len(data)} bytes at byte {start}, not {length}: the file has changed")
    return data


def open_seekable(location: str) -> BinaryIO:
    """A file open for reading. Of a remote one, the parts that are asked for are fetched.

    Raises:
        OSError: a remote file that is not there or refused.
        DataError: a local file that cannot be read or is none, or a server that does not answer.
    """
    if not is_url(location):
        try:
            return io.BufferedReader(_open_file(location))
        except OSError as error:
            raise DataError(f"{location} cannot be read: {error.strerror}: mend or remove it") from None
    total = attempt(location, lambda: file_size(location, patience().stall))
    if not total or not attempt(location, lambda: serves_parts(location, patience().stall)):
        return io.BytesIO(read(location))
    return io.BufferedReader(_Remote(location, total), _READ_AHEAD)


def size(location: str) -> int:
    """Bytes of a file; 0 where nothing tells, or where it is not there."""
    try:
        if not is_url(location):
            return Path(location).stat().st_size
        return attempt(location, lambda: file_size(location, patience().stall)) or 0
    except OSError:
        return 0


def walk(folder: str, deep: bool = True) -> list[tuple[str, int]]:
    """(path below ``folder``, bytes) of every file that is not hidden, sorted; ``deep``: also in folders below a URL.

    Links are followed, loops are not; what a link points to in vain, and what is no file (a pipe, say), has 0 bytes and
    is reported when read.
    """
    if not is_url(folder):
        return sorted(_walk(Path(folder), Path(folder)))
    fs, root = connect(folder)
    depth = None if deep else 1
    found = attempt(folder, lambda: fs.find(root, maxdepth=depth, detail=True))
    below = ((path[len(root) :].lstrip("/"), info.get("size") or 0) for path, info in found.items())
    names = [(unquote(name) if is_web(folder) else name, size) for name, size in below]
    return sorted((name, size) for name, size in names if name and not re.search(r"(^|/)\.", name))


def glob(pattern: str) -> list[str]:
    """The locations that fit ``pattern`` (``*``, ``?``, ``[]``), sorted."""
    if not is_url(pattern):
        return sorted(str(path) for path in filesystem(f"file://{os.getcwd()}")[0].glob(pattern))  # noqa: PTH109
    fs, path = connect(pattern)
    return sorted(fs.unstrip_protocol(found) for found in attempt(pattern, lambda: fs.glob(path)))


def patience() -> Patience:
    """How long a server is asked again."""
    return Patience(PATIENCE_SECONDS, remedy="check the server and the network; the same command goes on from here")


def connect(url: str) -> tuple[Any, str]:
    """``filesystem`` of a protocol that may have to reach its server for it (ftp, sftp), with patience.

    Raises:
        PermissionError: the server refuses.
        DataError: it did not answer in time; or see ``filesystem``.
    """
    return _told(url, lambda: persist(lambda: filesystem(url), url, patience()))


def attempt(url: str, action: Callable[[], Value]) -> Value:
    """The result of ``action``, tried again while the server fails and there is patience.

    Raises:
        FileNotFoundError, PermissionError: the server says that there is no such file, or refuses it.
        DataError: it did not answer in time.
    """

    def once() -> Value:
        with fsspec_errors(url):
            return action()

    return _told(url, lambda: persist(once, url, patience()))


def check_parts(location: str) -> None:
    """Raise DataError if parts of a file cannot be had without the rest."""
    if is_url(location) and not attempt(location, lambda: serves_parts(location, patience().stall)):
        raise DataError(f"{shown(location)}: its server does not serve parts of files: download it first")


class _Remote(io.RawIOBase):
    """A remote file of ``total`` bytes; ``io.BufferedReader`` reads it ahead."""

    def __init__(self, location: str, total: int) -> None:
        self._location, self._total, self._at = location, total, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._total}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        length = min(len(buffer), max(self._total - self._at, 0))
        if length:
            buffer[:length] = read(self._location, self._at, length)
        self._at += length
        return length


def _walk(folder: Path, root: Path, above: tuple[str, ...] = ()) -> Iterator[tuple[str, int]]:
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                deeper = entry.is_dir()
                size = entry.stat().st_size if entry.is_file() else 0
            except OSError:  # a link to itself, say
                deeper, size = False, 0
            if deeper:
                yield from _walk(Path(entry.path), root, (*above, real))
            else:
                yield os.path.relpath(entry.path, root), size


def _open_file(location: str) -> io.FileIO:
    """A local file open for reading; what is no file is refused, for a pipe may never send anything."""
    file = io.FileIO(location, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", location)
    return file


def _is_there(location: str, ask: Callable[[], object]) -> bool:
    try:
        attempt(location, ask)
    except FileNotFoundError:
        return False
    return True


def _told(url: str, action: Callable[[], Value]) -> Value:
    """The result of ``action``; what a server has not, or refuses, as an ``OSError``."""
    try:
        return action()
    except Missing as error:
        raise FileNotFoundError(errno.ENOENT, str(error), shown(url)) from None
    except Refused as error:
        raise PermissionError(errno.EACCES, str(error), shown(url)) from None
