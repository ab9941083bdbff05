"""Files by their location: a local path, http(s) by the standard library, and whatever else fsspec knows (s3, gs ...).

What a server refuses raises ``Refused``: asking again will not help. All that may pass raises ``Interrupted``.
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
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from ummim.errors import DataError

_PIECE = 1 << 20  # bytes read at once
_FSSPEC_PIECE = 8 << 20  # a request each
_PASSING = (408, 425, 429)  # besides 5xx: timed out, too early, too many requests
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
_LOCAL_REFUSALS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)


class Refused(Exception):
    """The file cannot be had, now or later; the message is the reason."""


class Interrupted(Exception):
    """The file could not be read, or not to its end; the message is the reason."""


class OtherFile(Interrupted):
    """There is a file, but not the one that was looked for."""


def is_url(location: str) -> bool:
    """Whether ``location`` is no local path; a ``file://`` URL is one, see ``local_path``."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None and not location.startswith("file://")


def local_path(location: str) -> str:
    """The path that a ``file://`` URL names; any other location as it is."""
    return unquote(urlsplit(location).path) if location.startswith("file://") else location


def join(folder: str, name: str) -> str:
    """The location of the file ``name`` of a folder; a URL's query (a signature, say) goes with it."""
    if not is_url(folder):
        return os.path.join(folder, name)  # noqa: PTH118  (locations are text)
    parts = urlsplit(folder)
    name = quote(name) if parts.scheme in ("http", "https") else name
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def beside(location: str, name: str) -> str:
    """The location of the file ``name`` in the folder of another one."""
    if not is_url(location):
        return join(os.path.dirname(location), name)  # noqa: PTH120
    parts = urlsplit(location)
    return join(urlunsplit(parts._replace(path=parts.path.rpartition("/")[0])), name)


def shown(location: str) -> str:
    """``location`` for messages: a URL without its query and password, which may be secrets."""
    if not is_url(location):
        return location
    parts = urlsplit(location)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


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
    if location.startswith(("http://", "https://")):
        return _http(location, start, size, timeout)
    return _fsspec(location, start, size)


def read_range(location: str, start: int, length: int, timeout: float) -> bytes:
    """``length`` bytes of a file from ``start`` on, fewer at its end. Raises like ``stream``."""
    if location.startswith(("http://", "https://")):
        with _answer(location, timeout, f"bytes={start}-{start + length - 1}") as answer:
            return _some(_body(answer, start), length)
    if is_url(location):
        with _fsspec_errors(location):
            fs, path = _filesystem(location)
            return fs.cat_file(path, start=start, end=start + length)
    return _some(_local(location, start, None), length)


def file_size(location: str, timeout: float) -> int | None:
    """Bytes of a file, None where the server does not tell. Raises like ``stream``."""
    if location.startswith(("http://", "https://")):
        with suppress(Refused), _answer(location, timeout, None, "HEAD") as answer:
            return _total(answer)
        with _answer(location, timeout, "bytes=0-0") as answer:  # some servers know no HEAD, or refuse it
            return _total(answer)
    if is_url(location):
        with _fsspec_errors(location):
            fs, path = _filesystem(location)
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
        raise (Refused if error.errno in _LOCAL_REFUSALS else Interrupted)(reason) from None


def _http(url: str, start: int, size: int | None, timeout: float) -> Iterator[bytes]:
    with _answer(url, timeout, f"bytes={start}-" if start else None) as answer:
        _check_size(_total(answer), size)
        yield from _body(answer, start)


@contextmanager
def _answer(url: str, timeout: float, wanted: str | None, method: str = "GET") -> Iterator[http.client.HTTPResponse]:
    """The server's answer for the range ``wanted``; errors, while it is read too, become ours."""
    headers = {"User-Agent": "ummim", "Accept-Encoding": "identity"} | ({"Range": wanted} if wanted else {})
    try:
        request = urllib.request.Request(url, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            raise OtherFile("it is shorter there than its index says") from None
        passing = error.code >= 500 or error.code in _PASSING
        raise (Interrupted if passing else Refused)(f"HTTP {error.code} {error.reason}") from None
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
    with _fsspec_errors(url):
        fs, path = _filesystem(url)
        found = fs.size(path)
        _check_size(found, size)
        while start < found:
            piece = fs.cat_file(path, start=start, end=min(start + _FSSPEC_PIECE, found))
            if not piece:
                raise Interrupted(f"nothing came from byte {start} on")
            yield piece
            start += len(piece)


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(url)  # fsspec keeps one for each process and set of options


@contextmanager
def _fsspec_errors(url: str) -> Iterator[None]:
    """What the many back ends raise becomes ours; each has timeouts and retries of its own besides."""
    scheme = urlsplit(url).scheme
    try:
        yield
    except (Refused, Interrupted):
        raise
    except ImportError as error:
        remedy = f"pip install 'ummim[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else str(error)
        raise DataError(f"{shown(url)}: {scheme}:// needs a package that is not installed: {remedy}") from None
    except FileNotFoundError:
        raise Refused("no such file") from None
    except Exception as error:  # botocore's NoCredentialsError, for one, is no OSError
        reason = " ".join(str(error).split()) or type(error).__name__
        final = isinstance(error, (PermissionError, IsADirectoryError, ValueError))
        raise (Refused if final or "Credentials" in type(error).__name__ else Interrupted)(reason) from None
