"""Plain WebDataset tars made randomly addressable by the index that lies beside them.

folder/shard-000000.tar ...  the shards
folder/index.npy             sample table: one row a sample, ordered by shard and offset; memory-mapped
folder/classes.txt           one class name a line, the line number being the label; labelled data only
folder/index.json            each shard's size, checksum and sample count; written last
"""

import hashlib
import os
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ummim.data.cache import ShardCache, default_cache
from ummim.data.download import Patience, fetch_range, persist
from ummim.data.index_files import (
    CLASSES,
    FORMAT,
    INDEX,
    JOURNAL,
    TABLE,
    UNLABELLED,
    Shard,
    copy_index,
    map_table,
    parse_index,
    parse_shards,
    read_classes,
    read_index,
    table_dtype,
)
from ummim.data.remote import Refused, file_size
from ummim.data.urls import is_url, join, local_path, shown
from ummim.errors import DataError

__all__ = [
    "CLASSES", "FORMAT", "INDEX", "JOURNAL", "TABLE", "UNLABELLED", "Shard", "ShardIndex", "ShardReader",
    "read_classes", "table_dtype",
]  # fmt: skip

_OPEN_FILES = 256  # per process; the order keeps streams * window shards in use
_IDLE_SECONDS = 30.0  # without a read, after which a file that was evicted from the cache is closed


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """An opened index. Cheap to pass to worker processes: each maps the table itself.

    Attributes:
        folder: where the shards lie; of remote ones, where their index or a copy of it is.
        shards: the tars, in the order of the table.
        first: (shards + 1,) int64, the row of each shard's first sample; the last entry is the sample count.
        table: (samples,) rows of ``table_dtype``, memory-mapped.
        classes: class names by label, or None for unlabelled data.
        digest: SHA-256 (hex) of the index, which holds the checksums of the table and of every shard.
        table_sha256: checksum (hex) of the table's file.
        source: identifies the images and options of a build; None for shards made by others.
        url: where remote shards lie; None for a local folder.
        cache: copies of whole shards on this node, through which they are read; None reads them where they are.
        is_copy: ``folder`` is in the cache; else the index is nowhere else.
    """

    folder: Path
    shards: tuple[Shard, ...]
    first: np.ndarray
    table: np.ndarray
    classes: list[str] | None
    digest: str
    table_sha256: str
    source: str | None
    url: str | None = None
    cache: ShardCache | None = None
    is_copy: bool = False

    @staticmethod
    def open(location: str | os.PathLike[str], cache: ShardCache | None = None) -> "ShardIndex":
        """Open the index of a folder; reads a few kilobytes, whatever the number of samples.

        Of a URL (http, https, s3, gs and whatever fsspec knows), the index is copied to the cache first, unless it
        is there already; an index that has changed is noticed, as long as its server answers.

        Args:
            location: a folder, or the URL of one.
            cache: where to keep copies of shards. None: nowhere, or in the default cache for shards behind a URL.

        Raises:
            DataError: the folder, index, table or class list is missing or does not fit.
        """
        place = local_path(os.fspath(location))
        if not is_url(place):
            return _open(Path(place), None, cache)
        cache = cache or default_cache()
        return _open(copy_index(place, cache), place, cache)

    def __len__(self) -> int:
        return len(self.table)

    def __reduce__(self) -> tuple:  # a pickled memmap would carry the whole table
        if self.is_copy:
            return _reopen, (self.url, self.cache, self.digest)
        return ShardIndex.open, (self.folder,) if self.cache is None else (self.folder, self.cache)

    @property
    def place(self) -> str:
        """The folder or URL, for messages."""
        return str(self.folder) if self.url is None else shown(self.url)

    def key(self, row: int) -> str:
        return str(self.table["key"][row], "utf-8")

    def location(self, number: int) -> str:
        """Path or URL of a shard."""
        name = self.shards[number].name
        return str(self.folder / name) if self.url is None else join(self.url, name)

    def open_shard(self, number: int) -> int:
        """A file descriptor of a shard; if there is a cache, of the copy there, which is fetched unless it is there.

        Raises:
            DataError: the shard cannot be had, or is of another size than the index says. ``SourceDown`` if nothing
                can be had from where it lies.
        """
        shard, location = self.shards[number], self.location(number)
        if self.cache is not None:
            return self.cache.open(location, shard.sha256, shard.bytes)
        try:
            file = os.open(location, os.O_RDONLY)
        except OSError as error:
            raise _unopened(location, str(error.strerror)) from None
        size = os.fstat(file).st_size
        if size != shard.bytes:
            os.close(file)
            raise _resized(location, size, shard)
        return file

    def check(self) -> None:
        """Ask for the size of every shard; of remote ones, of the first and the last only, if they are not here.

        Raises:
            DataError: a shard is missing, or its size is not the index's.
        """
        if self.url is not None:
            for number in sorted({0, len(self.shards) - 1}):
                self._check_remote(number)
            return
        for shard in self.shards:
            path = self.folder / shard.name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise _unopened(path, str(error.strerror)) from None
            if size != shard.bytes:
                raise _resized(path, size, shard)

    def _check_remote(self, number: int) -> None:
        assert self.cache is not None
        location, patience = self.location(number), Patience(self.cache.retry_seconds)
        if self.cache.path(self.shards[number].sha256).exists():
            return  # as it was when it came
        try:
            size = persist(lambda: file_size(location, patience.stall), location, patience)
        except Refused as error:
            raise _unopened(shown(location), str(error)) from None
        if size is not None and size != self.shards[number].bytes:
            raise _resized(shown(location), size, self.shards[number])


@dataclass
class ShardReader:
    """Reads samples by row through a small number of open files. One for each process.

    ``sparse``: of a remote shard that is not in the cache, read only what is asked for; for few samples of many shards.
    """

    index: ShardIndex
    sparse: bool = False
    _files: OrderedDict[int, int] = field(default_factory=OrderedDict)  # shard number -> file descriptor
    _last_read: dict[int, float] = field(default_factory=dict)  # shard number -> seconds, of files in the cache

    def read(self, row: int) -> bytes:
        """The image bytes of a row of the table.

        Raises:
            DataError: the shard is missing, of another size than the index says, or cannot be read. ``SourceDown``
                if nothing can be had from where it lies.
        """
        record = self.index.table[row]
        number, offset, length = int(record["shard"]), int(record["offset"]), int(record["length"])
        if self.sparse and self._is_away(number):
            data = self._read_remote(number, offset, length)
        else:
            try:
                data = os.pread(self._file(number), length, offset)
            except OSError as error:
                raise DataError(f"{self.where(row)}: cannot be read: {error.strerror}") from None
        if len(data) != length:
            raise DataError(f"{self.where(row)}: the shard ends early, it was cut while in use: {_remedy(self.index)}")
        return data

    def where(self, row: int) -> str:
        """Shard, key and offset of a row, for messages."""
        record = self.index.table[row]
        shard = shown(self.index.location(int(record["shard"])))
        return f"{shard}: key {self.index.key(row)!r} at byte {record['offset']}"

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _file(self, number: int) -> int:
        if self.index.cache is not None:
            self._last_read[number] = time.monotonic()
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        self._close_evicted()
        file = self._files[number] = self.index.open_shard(number)
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return file

    def _close_evicted(self) -> None:
        """Give back the disk space of copies that are evicted from the cache and read no more."""
        idle = time.monotonic() - _IDLE_SECONDS
        for number in [n for n in self._files if self._last_read.get(n, idle) < idle]:
            if os.fstat(self._files[number]).st_nlink == 0:
                os.close(self._files.pop(number))

    def _is_away(self, number: int) -> bool:
        cache = self.index.cache
        return (
            cache is not None
            and number not in self._files
            and not cache.path(self.index.shards[number].sha256).exists()
        )

    def _read_remote(self, number: int, offset: int, length: int) -> bytes:
        assert self.index.cache is not None
        location = self.index.location(number)
        try:
            return fetch_range(location, offset, length, Patience(self.index.cache.retry_seconds))
        except Refused as error:
            raise _unopened(shown(location), str(error)) from None


def _open(folder: Path, copy_of: str | None, cache: ShardCache | None) -> ShardIndex:
    place = str(folder) if copy_of is None else shown(copy_of)
    raw = read_index(folder)
    content = parse_index(raw, place)
    shards, labelled = parse_shards(content, place), content["labelled"]
    classes = read_classes(folder)
    if labelled and classes is None:
        raise DataError(
            f"{join(place, CLASSES)} is missing, but the samples are labelled: restore it (one class name a "
            f"line, in label order), or drop the labels: python -m data_prep index --ignore-labels {place}"
        )
    first = np.cumsum([0, *(shard.samples for shard in shards)], dtype=np.int64)
    table = map_table(folder, int(first[-1]), place)
    digest = hashlib.sha256(raw).hexdigest()
    labels, url = classes if labelled else None, copy_of or content.get("url")
    if url is not None and cache is None:
        cache = default_cache()
    return ShardIndex(
        folder, shards, first, table, labels, digest, content["table_sha256"], content["source"], url, cache,
        is_copy=copy_of is not None,
    )  # fmt: skip


def _reopen(url: str, cache: ShardCache, digest: str) -> ShardIndex:
    """The index that another process has opened."""
    return _open(copy_index(url, cache, digest), url, cache)


def _unopened(path: Path | str, reason: str) -> DataError:
    folder = str(path).rpartition("/")[0] or "."
    return DataError(f"{path}: {reason}: restore the shard, or index what is left: python -m data_prep index {folder}")


def _resized(path: Path | str, size: int, shard: Shard) -> DataError:
    what = "truncated" if size < shard.bytes else "not the shard that was indexed"
    folder = str(path).rpartition("/")[0] or "."
    return DataError(
        f"{path} has {size} bytes, its index says {shard.bytes}: {what}; restore it, or index again: "
        f"python -m data_prep index {folder}"
    )


def _remedy(index: ShardIndex) -> str:
    return f"find every fault with: python -m data_prep verify {index.place}"
