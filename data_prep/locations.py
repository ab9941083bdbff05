"""Files by path or by URL: one way to list and read both. URLs go through fsspec (http, s3, gs, memory, ...)."""

import io
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import fsspec

from ummim.errors import DataError

Value = TypeVar("Value")
_ATTEMPTS = 4  # waiting 1, 2 and 4 seconds between them
_READ_AHEAD = 2**18


def is_url(location: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.:-]*://", location) is not None


def local(location: str) -> str:
    """``location``, a ``file://`` URL made a path."""
    return re.sub(r"^(file|local)://", "", location)


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of ``url`` and its path there.

    Raises:
        DataError: fsspec does not know the protocol, or needs a package for it.
    """
    if "::" in url:
        raise DataError(f"{url}: chained URLs (::) are not taken: give the files themselves")
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url} cannot be opened: {error}") from None


def exists(location: str) -> bool:
    if not is_url(location):
        return Path(location).exists()
    fs, path = filesystem(location)
    try:
        attempt(location, lambda: fs.info(path))
    except FileNotFoundError:
        return False
    return True


def is_folder(location: str) -> bool:
    if not is_url(location):
        return Path(location).is_dir()
    fs, path = filesystem(location)
    if location.startswith("http"):  # fsspec takes every page with links for a folder
        return location.endswith("/")
    return attempt(location, lambda: fs.isdir(path))


def join(folder: str, name: str) -> str:
    """The location of the file ``name`` below ``folder``."""
    return f"{folder.rstrip('/')}/{name}"


def parent(location: str) -> str:
    return location.rstrip("/").rpartition("/")[0] or ("/" if location.startswith("/") else ".")


def basename(location: str) -> str:
    return location.rstrip("/").rpartition("/")[2]


def read(location: str, start: int | None = None, length: int = 0) -> bytes:
    """The content of a file, or ``length`` bytes of it from ``start``.

    Raises:
        OSError: a local file that cannot be read, or (FileNotFoundError) a remote one that is not there.
        DataError: a server that does not answer, or a file that ends before the last byte.
    """
    if not is_url(location):
        with io.FileIO(location) as file:
            data = file.readall() if start is None else os.pread(file.fileno(), length, start)
    else:
        fs, path = filesystem(location)
        end = None if start is None else start + length
        data = attempt(location, lambda: fs.cat_file(path, start, end))
    if start is not None and len(data) != length:
        raise DataError(f"{location}: {len(data)} bytes at byte {start}, not {length}: "
                        "the file has changed, or its server does not serve parts of files")  # fmt: skip
    return data


def open_seekable(location: str) -> BinaryIO:
    """A file open for reading. Of a remote one, the parts that are asked for are fetched."""
    if not is_url(location):
        return Path(location).open("rb")
    fs, path = filesystem(location)
    file = attempt(location, lambda: fs.open(path, "rb", block_size=_READ_AHEAD, cache_type="readahead"))
    return file if file.seekable() else io.BytesIO(read(location))


def size(location: str) -> int:
    """Bytes of a file; 0 where nothing tells, or where it is not there."""
    try:
        if not is_url(location):
            return Path(location).stat().st_size
        fs, path = filesystem(location)
        return int(attempt(location, lambda: fs.size(path)) or 0)
    except OSError:
        return 0


def walk(folder: str) -> list[tuple[str, int]]:
    """(path below ``folder``, bytes) of every file that is not hidden, sorted.

    Links are followed, loops are not; what a link points to in vain has 0 bytes and is reported when read.
    """
    if not is_url(folder):
        return sorted(_walk(Path(folder), Path(folder)))
    fs, root = filesystem(folder)
    found = attempt(folder, lambda: fs.find(root, detail=True))
    names = [(path[len(root) :].lstrip("/"), info.get("size") or 0) for path, info in found.items()]
    return sorted((name, size) for name, size in names if name and not re.search(r"(^|/)\.", name))


def glob(pattern: str) -> list[str]:
    """The locations that fit ``pattern`` (``*``, ``?``, ``[]``), sorted."""
    if not is_url(pattern):
        fs = fsspec.filesystem("file")
        return sorted(str(path) for path in fs.glob(pattern))
    fs, path = filesystem(pattern)
    return sorted(fs.unstrip_protocol(found) for found in attempt(pattern, lambda: fs.glob(path)))


def _walk(folder: Path, root: Path, above: tuple[str, ...] = ()) -> Iterator[tuple[str, int]]:
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), root, (*above, real))
            else:
                yield os.path.relpath(entry.path, root), entry.stat().st_size if entry.is_file() else 0


def attempt(url: str, action: Callable[[], Value]) -> Value:
    """The result of ``action``, tried again when the server fails.

    Raises:
        FileNotFoundError: the server says so.
        DataError: it failed at every attempt.
    """
    for number in range(1, _ATTEMPTS + 1):
        try:
            return action()
        except DataError:
            raise
        except Exception as error:  # each protocol's client raises its own
            if _is_missing(error):
                raise
            if number == _ATTEMPTS:
                raise DataError(f"{url} cannot be reached, after {_ATTEMPTS} attempts: {error!r}; "
                                "run the same command again, it goes on where it was") from None  # fmt: skip
            time.sleep(2 ** (number - 1))
    raise AssertionError


def _is_missing(error: Exception) -> bool:
    """Whether a file is not there; fsspec says so of a web server that is down or failing, too, but with the cause."""
    cause = error.__cause__
    down = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
    return isinstance(error, FileNotFoundError) and not down and getattr(cause, "status", 404) < 500
