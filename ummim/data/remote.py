"""Files by their location: a local path, http(s) by the standard library, and whatever else fsspec knows (s3, gs ...).

What a server refuses raises ``Refused``: asking again will not help. All that may pass raises ``Interrupted``.
Listings, and writing, go through ``filesystem`` and ``fsspec_errors``.
"""

import errno
import http.client
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import quote

from ummim.data.urls import is_url, is_web, shown
from ummim.errors import DataError

_PIECE = 1 << 20  # bytes read at once
_FSSPEC_PIECE = 8 << 20  # a request each
_PASSING = (408, 425, 429)  # besides 5xx: timed out, too early, too many requests
_MISSING = (404, 410)
_URL_MARKS = "%/:?#[]@!$&'()*+,;=~"  # what else a URL must not hold, such as a space, is quoted when it is asked for
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
_LOCAL_REFUSALS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)


class Refused(Exception):
    """The file cannot be had, now or later; the message is the reason."""


class Missing(Refused):
    """There is no such file."""


class Interrupted(Exception):
    """The file could not be read, or not to its end; the message is the reason."""


class OtherFile(Interrupted):
    """There is a file, but not the one that was looked for."""


def stream(location: str, start: int, size: int | None, timeout: float) -> Iterator[bytes]:
    """Yield the bytes of a file from byte ``start`` to its end.

    Args:
        location: a path or URL.
        start: where to begin.
        size: of the whole file in bytes, if it is known.
        timeout: seconds without any byte after which the connection counts as broken.

    Raises:
        Refused, Interrupted, OtherFile: a file of another size.
        DataError: a URL of a kind that needs a package which is not installed.
    """
    if not is_url(location):
        return _local(location, start, size)
    if is_web(location):
        return _http(location, start, size, timeout)
    return _fsspec(location, start, size)


def read_range(location: str, start: int, length: int, timeout: float) -> bytes:
    """``length`` bytes of a file from ``start`` on, fewer at its end. Raises like ``stream``."""
    if is_web(location):
        with _answer(location, timeout, f"bytes={start}-{start + length - 1}") as answer:
            return _some(_body(answer, start), length)
    if is_url(location):
        with fsspec_errors(location):
            fs, path = filesystem(location)
            return fs.cat_file(path, start=start, end=start + length)
    return _some(_local(location, start, None), length)


def serves_parts(location: str, timeout: float) -> bool:
    """Whether a part of a file can be had without what lies before it. Raises like ``stream``."""
    if not is_web(location):
        return True
    with _answer(location, timeout, "bytes=0-0") as answer:
        return answer.status == 206


def file_size(location: str, timeout: float) -> int | None:
    """Bytes of a file, None where the server does not tell. Raises like ``stream``."""
    if is_web(location):
        with suppress(Refused), _answer(location, timeout, None, "HEAD") as answer:
            return _total(answer)
        with _answer(location, timeout, "bytes=0-0") as answer:  # some servers know no HEAD, or refuse it
            return _total(answer)
    if is_url(location):
        with fsspec_errors(location):
            fs, path = filesystem(location)
            return fs.size(path)
    with _local_errors():
        return os.stat(location).st_size  # noqa: PTH116


def _some(pieces: Iterator[bytes], length: int) -> bytes:
    data = bytearray()
    for piece in pieces:
        data += piece
        if len(data) >= length:
            break
    return bytes(data[:length])


def _check_size(found: int | None, size: int | None) -> None:
    if found is not None and size is not None and found != size:
        raise OtherFile(f"it has {found} bytes there, its index says {size}")


def _local(path: str, start: int, size: int | None) -> Iterator[bytes]:
    with _local_errors(), open(path, "rb") as file:  # noqa: PTH123
        _check_size(os.fstat(file.fileno()).st_size, size)
        file.seek(start)
        while piece := file.read(_PIECE):
            yield piece


@contextmanager
def _local_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        refused = Missing if error.errno == errno.ENOENT else Refused
        raise (refused if error.errno in _LOCAL_REFUSALS else Interrupted)(reason) from None


def _http(url: str, start: int, size: int | None, timeout: float) -> Iterator[bytes]:
    with _answer(url, timeout, f"bytes={start}-" if start else None) as answer:
        _check_size(_total(answer), size)
        yield from _body(answer, start)


@contextmanager
def _answer(url: str, timeout: float, wanted: str | None, method: str = "GET") -> Iterator[http.client.HTTPResponse]:
    """The server's answer for the range ``wanted``; errors, while it is read too, become ours."""
    headers = {"User-Agent": "ummim", "Accept-Encoding": "identity"} | ({"Range": wanted} if wanted else {})
    try:
        request = urllib.request.Request(quote(url, safe=_URL_MARKS), headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            raise OtherFile("it is shorter there than its index says") from None
        passing = error.code >= 500 or error.code in _PASSING
        kind = Interrupted if passing else Missing if error.code in _MISSING else Refused
        raise kind(f"HTTP {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            raise Interrupted(f"no answer for {timeout:g} s") from None
        text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        final = (ssl.SSLCertVerificationError, http.client.InvalidURL, ValueError)
        raise (Refused if isinstance(cause, final) else Interrupted)(text) from None


def _total(answer: http.client.HTTPResponse) -> int | None:
    """Size of the whole file, from the headers."""
    if answer.status == 206:
        match = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        return int(match[1]) if match else None
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _body(answer: http.client.HTTPResponse, start: int) -> Iterator[bytes]:
    """The bytes from ``start`` on, also of a server that ignores ranges and sends the whole file."""
    left: int | None = None
    skip = start
    if answer.status == 206:
        match = re.match(rf"bytes {start}-", answer.headers.get("Content-Range", ""))
        if match is None:
            raise Interrupted(f"the server sent another range than bytes {start}-")
        skip = 0
    length = answer.headers.get("Content-Length", "")
    if length.isdigit():
        left = int(length)
    while left != 0:
        piece = answer.read1(_PIECE if left is None else min(left, _PIECE))
        if not piece:
            if left:
                raise Interrupted(f"the connection ended {left} bytes early")
            return
        left = None if left is None else left - len(piece)
        if skip < len(piece):
            yield piece[skip:]
        skip = max(skip - len(piece), 0)


def _fsspec(url: str, start: int, size: int | None) -> Iterator[bytes]:
    with fsspec_errors(url):
        fs, path = filesystem(url)
        found = fs.size(path)
        _check_size(found, size)
        while start < found:
            piece = fs.cat_file(path, start=start, end=min(start + _FSSPEC_PIECE, found))
            if not piece:
                raise Interrupted(f"nothing came from byte {start} on")
            yield piece
            start += len(piece)


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of ``url``, and the path there.

    Raises:
        DataError: fsspec does not know the protocol, or needs a package for it.
    """
    import fsspec

    if "::" in url:
        raise DataError(f"{url}: chained URLs (::) are not taken: give the files themselves")
    with fsspec_errors(url):
        try:
            return fsspec.core.url_to_fs(url)  # fsspec keeps one for each process and set of options
        except ValueError as error:
            raise DataError(f"{shown(url)} cannot be opened: {error}") from None


@contextmanager
def fsspec_errors(url: str) -> Iterator[None]:
    """What the many back ends raise becomes ours; each has timeouts and retries of its own besides."""
    scheme = url.partition("://")[0]
    try:
        yield
    except (Refused, Interrupted, DataError):
        raise
    except ImportError as error:
        remedy = f"pip install 'ummim[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else str(error)
        raise DataError(f"{shown(url)}: {scheme}:// needs a package that is not installed: {remedy}") from None
    except Exception as error:  # botocore's NoCredentialsError, for one, is no OSError
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, FileNotFoundError) and not _hides_failure(error):
            raise Missing("no such file") from None
        status = getattr(error, "status", 0)  # of aiohttp's
        final = isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError, ValueError))
        final = final or (400 <= status < 500 and status not in _PASSING)
        raise (Refused if final or "Credentials" in type(error).__name__ else Interrupted)(reason) from None


def _hides_failure(error: FileNotFoundError) -> bool:
    """fsspec says that a file is not there of a web server that is down or failing, too, but with the cause."""
    cause = error.__cause__
    down = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
    return down or getattr(cause, "status", 404) >= 500
