"""Names of files and folders that may be local paths or URLs: text, nothing is asked of any server."""

import os
import re
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

_WEB = ("http", "https")  # their paths are quoted; object stores' are not


def is_url(location: str) -> bool:
    """Whether ``location`` is no local path; a ``file://`` URL is one, see ``local_path``."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.:-]*://", location) is not None and not _is_file(location)


def is_web(location: str) -> bool:
    """Whether ``location`` is an http(s) URL."""
    return location.startswith(("http://", "https://"))


def local_path(location: str) -> str:
    """The path that a ``file://`` URL names; any other location as it is."""
    return unquote(urlsplit(location).path) if _is_file(location) else location


def join(folder: str, name: str) -> str:
    """The location of the file ``name`` of a folder; a URL's query (a signature, say) goes with it."""
    if not is_url(folder):
        return os.path.join(folder, name)  # noqa: PTH118  (locations are text)
    parts = _split(folder)
    name = quote(name) if parts.scheme in _WEB else name
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def parent(location: str) -> str:
    """The folder that a file lies in."""
    if not is_url(location):
        return os.path.dirname(location.rstrip("/")) or "."  # noqa: PTH120
    parts = _split(location)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0]))


def beside(location: str, name: str) -> str:
    """The location of the file ``name`` in the folder of another one."""
    return join(parent(location), name)


def basename(location: str) -> str:
    """The last part of a path or of a URL's."""
    if not is_url(location):
        return location.rstrip("/").rpartition("/")[2]
    parts = _split(location)
    name = parts.path.rstrip("/").rpartition("/")[2]
    return unquote(name) if parts.scheme in _WEB else name


def shown(location: str) -> str:
    """``location`` for messages: a URL without its query and password, which may be secrets."""
    if not is_url(location):
        return location
    parts = _split(location)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def _split(url: str) -> SplitResult:
    """The parts of a URL; an object store's keys may hold ``?`` and ``#``."""
    if is_web(url):
        return urlsplit(url)
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return SplitResult(scheme, host, slash + path, "", "")


def _is_file(location: str) -> bool:
    return location.startswith(("file://", "local://"))
