"""The files of an index beside its shards: what is in them, and copies of remote ones."""

import hashlib
import json
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ummim.atomic import write_bytes
from ummim.data.cache import ShardCache
from ummim.data.download import Patience, download, fetch_file, gave_up
from ummim.data.faults import SourceDown
from ummim.data.locks import locked
from ummim.data.remote import Interrupted, Refused
from ummim.data.urls import is_url, join, shown
from ummim.errors import DataError

INDEX, TABLE, CLASSES = "index.json", "index.npy", "classes.txt"
JOURNAL = "build.journal"  # there while a build is unfinished
FORMAT = "ummim-shards-1"
UNLABELLED = -1
_WITH_COPY_SECONDS = 10.0  # at most, that a server is asked for its index if a copy is here

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, size in bytes, SHA-256 (hex) and number of samples."""

    name: str
    bytes: int
    sha256: str
    samples: int


def table_dtype(key_bytes: int) -> np.dtype:
    """Row of the sample table. ``key`` is UTF-8; offset and length are of the image's bytes in the tar."""
    fields = [("key", f"S{max(key_bytes, 1)}"), ("shard", "<u4"), ("offset", "<u8"), ("length", "<u4")]
    return np.dtype([*fields, ("label", "<i4")])


def read_index(root: Path) -> bytes:
    """The index of a local folder.

    Raises:
        DataError: there is none.
    """
    if not root.is_dir():
        raise DataError(f"{root} is no folder of shards: build one: python -m data_prep build SRC {root}")
    try:
        return (root / INDEX).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{root / INDEX} is missing: {_how_to_index(root)}") from None
    except OSError as error:
        raise DataError(
            f"{root / INDEX} is no index ({error!r}): make it again: python -m data_prep index {root}"
        ) from None


def parse_index(raw: bytes, place: str) -> dict[str, Any]:
    """The content of an index of the folder ``place``. Raises DataError if it is none."""
    path = join(place, INDEX)
    try:
        content = json.loads(raw)
        found = content["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is no index ({error!r}): make it again: python -m data_prep index {place}") from None
    if found != FORMAT:
        raise DataError(
            f"{path} has format {found!r}, not {FORMAT!r}: make it again: python -m data_prep index {place}"
        )
    return content


def parse_shards(content: dict[str, Any], place: str) -> tuple[Shard, ...]:
    """The shards of an index that has all that ``ShardIndex`` needs. Raises DataError if it has not."""
    path = join(place, INDEX)
    try:
        shards = tuple(Shard(**entry) for entry in content["shards"])
        missing = {"labelled", "table_sha256", "source"} - set(content)
        if missing:
            raise KeyError(min(missing))
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a whole index ({error}): make it anew: python -m data_prep index {place}"
        ) from None
    for shard in shards:
        if shard.name.startswith("/") or ".." in shard.name.split("/"):
            raise DataError(f"{path} names the shard {shard.name!r}, which leads out of its folder")
    url = content.get("url")
    if url is not None and not (isinstance(url, str) and is_url(url)):
        raise DataError(f"{path} says that the shards lie in {str(url)[:60]!r}, which is no URL: make it anew")
    return shards


def shards_url(folder: Path) -> str | None:
    """Where the shards of an index lie that does not lie beside them; None if it does, or cannot be read."""
    with suppress(DataError):
        url = parse_index(read_index(folder), str(folder)).get("url")
        return url if isinstance(url, str) else None
    return None


def read_classes(folder: Path) -> list[str] | None:
    """The class list of ``folder``, or None if it has none."""
    try:
        return (folder / CLASSES).read_text("utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / CLASSES} cannot be read: {error}") from None


def load_table(path: Path) -> np.ndarray:
    """(samples,) rows of ``table_dtype``, memory-mapped. Nothing is unpickled or unpacked.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no table; the message is the reason, in one line.
    """
    try:
        table = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # a damaged header makes numpy raise anything
        raise ValueError(f"is no table: {str(error).splitlines()[0] if str(error) else repr(error)}") from None
    kind, columns = table.dtype, table_dtype(1).names
    if table.ndim != 1 or kind.names != columns or kind != table_dtype(kind["key"].itemsize):
        raise ValueError(f"has shape {table.shape} and type {kind}, not rows of {', '.join(columns or ())}")
    return table


def map_table(root: Path, samples: int, place: str) -> np.ndarray:
    """The table in ``root``, memory-mapped; messages name the folder ``place``.

    Raises:
        DataError: it is missing, broken, or not of ``samples`` rows.
    """
    path = join(place, TABLE)
    try:
        table = load_table(root / TABLE)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is missing or broken ({error}): make it again: python -m data_prep index {place}"
        ) from None
    if len(table) != samples:
        raise DataError(
            f"{path} has shape {table.shape}, but {INDEX} lists {samples} samples: "
            f"make both again: python -m data_prep index {place}"
        )
    return table


def copy_index(url: str, cache: ShardCache, digest: str | None = None) -> Path:
    """Copy the index files of a remote folder to this node, unless they are here, and return the folder they are in.

    Args:
        url: of the remote folder.
        cache: where to.
        digest: of the index that is wanted, which another process has opened; None: the one that is there now. Where
            there is a copy, but no answer for ten seconds, it is the copy.

    Raises:
        DataError: the files cannot be had, do not fit together, or are not those that are wanted any more.
    """
    if digest is not None and (folder := _copies(url, cache, digest)).joinpath(INDEX).is_file():
        return folder
    kept = None if digest is not None else _kept_copy(url, cache)
    patience = cache.retry_seconds if kept is None else min(cache.retry_seconds, _WITH_COPY_SECONDS)
    try:
        return _new_copy(url, cache, digest, patience)
    except SourceDown as error:
        if kept is None:
            raise
        log.warning("%s. Going on with the copy of the index that is in the cache, as it was when last asked", error)
        return kept


def _new_copy(url: str, cache: ShardCache, digest: str | None, patience: float) -> Path:
    """The folder with a copy of the index that is there now; ``patience``: seconds to ask for it."""
    raw = _fetch_index(url, patience)
    content = parse_index(raw, shown(url))
    found = hashlib.sha256(raw).hexdigest()
    if digest not in (None, found):
        raise DataError(f"{shown(url)} has been built or indexed anew since this run began: start it again")
    folder = _copies(url, cache, found)
    try:
        with locked(folder.with_suffix(".lock")):
            folder.mkdir(exist_ok=True)
            _copy_classes(url, folder, content, patience)
            if not (folder / INDEX).is_file():
                _copy_table(url, folder, content, cache, patience)
                write_bytes(folder / INDEX, raw)  # last: with it the copy is whole
                _remove_others(folder)
    except OSError as error:
        raise cache.unusable(error) from None
    return folder


def _copies(url: str, cache: ShardCache, digest: str) -> Path:
    """``indices/URL-DIGEST``, both shortened."""
    return cache.folder / "indices" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{digest[:16]}"


def _kept_copy(url: str, cache: ShardCache) -> Path | None:
    """The folder with the whole copy of an index of ``url``; of several, the one made last."""
    found: list[tuple[float, Path]] = []
    for path in (cache.folder / "indices").glob(f"{_copies(url, cache, '').name}*/{INDEX}"):
        with suppress(FileNotFoundError):  # another process has a newer one
            found.append((path.stat().st_mtime, path.parent))
    return max(found)[1] if found else None


def _fetch_index(url: str, patience: float) -> bytes:
    try:
        return fetch_file(join(url, INDEX), Patience(patience))
    except Refused as error:
        raise DataError(
            f"{shown(join(url, INDEX))}: {error}: data.shards must be the URL of a folder that "
            "python -m data_prep build or index has made"
        ) from None


def _copy_classes(url: str, folder: Path, content: dict[str, Any], patience: float) -> None:
    """At every opening: classes may have been named anew, and older indices do not tell."""
    try:
        names = fetch_file(join(url, CLASSES), Patience(patience))
    except Refused:
        return  # unlabelled, or missed when the index is opened
    if content.get("classes_sha256") not in (None, hashlib.sha256(names).hexdigest()):
        raise DataError(f"{shown(join(url, CLASSES))} is not the one that was indexed: restore it, or index again")
    write_bytes(folder / CLASSES, names)


def _copy_table(url: str, folder: Path, content: dict[str, Any], cache: ShardCache, seconds: float) -> None:
    part, location = folder / f"{TABLE}.part", join(url, TABLE)
    patience = Patience(seconds)
    try:
        descriptor = download(location, part, content.get("table_sha256", ""), None, patience, cache.write)
    except Refused as error:
        raise DataError(f"{shown(location)}: {error}: make it again, together with {INDEX}") from None
    except Interrupted as error:
        raise SourceDown(gave_up(location, str(error), patience)) from None
    os.fsync(descriptor)
    os.close(descriptor)
    part.replace(folder / TABLE)


def _remove_others(folder: Path) -> None:
    """Copies of earlier indices of the same URL; who has one open keeps it."""
    ours = folder.name.partition("-")[0]
    for other in folder.parent.glob(f"{ours}-*"):
        if other != folder and other.is_dir():
            (other / INDEX).unlink(missing_ok=True)  # first: without it the copy is not whole
            with suppress(OSError):  # another process is at it, too
                for path in other.iterdir():
                    path.unlink()
                other.rmdir()


def _how_to_index(root: Path) -> str:
    if (root / JOURNAL).exists():
        return "the build has not finished: run the same command again, it goes on where it was"
    if any(root.glob("*.tar")):
        return f"make it from the shards: python -m data_prep index {root}"
    return f"there are no shards: build some: python -m data_prep build SRC {root}"
