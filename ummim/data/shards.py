"""Plain WebDataset tars made randomly addressable by the index that lies beside them.

folder/shard-000000.tar ...  the shards
folder/index.npy             sample table: one row a sample, ordered by shard and offset; memory-mapped
folder/classes.txt           one class name a line, the line number being the label; labelled data only
folder/index.json            each shard's size, checksum and sample count; written last
"""

import hashlib
import json
import os
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ummim.errors import DataError

INDEX, TABLE, CLASSES = "index.json", "index.npy", "classes.txt"
JOURNAL = "build.journal"  # there while a build is unfinished
FORMAT = "ummim-shards-1"
UNLABELLED = -1
_OPEN_FILES = 256  # per process; the order keeps streams * window shards in use


def table_dtype(key_bytes: int) -> np.dtype:
    """Row of the sample table. ``key`` is UTF-8; offset and length are of the image's bytes in the tar."""
    fields = [("key", f"S{max(key_bytes, 1)}"), ("shard", "<u4"), ("offset", "<u8"), ("length", "<u4")]
    return np.dtype([*fields, ("label", "<i4")])


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, size in bytes, SHA-256 (hex) and number of samples."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """An opened index. Cheap to pass to worker processes: each maps the table itself.

    Attributes:
        folder: where the shards lie.
        shards: the tars, in the order of the table.
        first: (shards + 1,) int64, the row of each shard's first sample; the last entry is the sample count.
        table: (samples,) rows of ``table_dtype``, memory-mapped.
        classes: class names by label, or None for unlabelled data.
        digest: SHA-256 (hex) of the index, which holds the checksums of the table and of every shard.
        table_sha256: checksum (hex) of the table's file.
        source: identifies the images and options of a build; None for shards made by others.
    """

    folder: Path
    shards: tuple[Shard, ...]
    first: np.ndarray
    table: np.ndarray
    classes: list[str] | None
    digest: str
    table_sha256: str
    source: str | None

    @staticmethod
    def open(folder: str | os.PathLike[str]) -> "ShardIndex":
        """Open the index of ``folder``; reads a few kilobytes, whatever the number of samples.

        Raises:
            DataError: the folder, index, table or class list is missing or does not fit.
        """
        root = Path(folder)
        content, raw = _read_index(root)
        try:
            shards = tuple(Shard(**entry) for entry in content["shards"])
            table_sha256, source = content["table_sha256"], content["source"]
            labelled = content["labelled"]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{root / INDEX} is not a whole index ({error}): make it anew: python -m data_prep index {root}"
            ) from None
        classes = read_classes(root)
        if labelled and classes is None:
            raise DataError(
                f"{root / CLASSES} is missing, but the samples are labelled: restore it (one class name a "
                f"line, in label order), or drop the labels: python -m data_prep index --ignore-labels {root}"
            )
        first = np.cumsum([0, *(shard.samples for shard in shards)], dtype=np.int64)
        table = _map_table(root, int(first[-1]))
        labels = classes if labelled else None
        digest = hashlib.sha256(raw).hexdigest()
        return ShardIndex(root, shards, first, table, labels, digest, table_sha256, source)

    def __len__(self) -> int:
        return len(self.table)

    def __reduce__(self) -> tuple:
        return ShardIndex.open, (self.folder,)  # a pickled memmap would carry the whole table

    def key(self, row: int) -> str:
        return str(self.table["key"][row], "utf-8")

    def check(self) -> None:
        """Stat every shard.

        Raises:
            DataError: a shard is missing, or its size is not the index's.
        """
        for shard in self.shards:
            path = self.folder / shard.name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise _unopened(path, error) from None
            if size != shard.bytes:
                raise _resized(path, size, shard)


@dataclass
class ShardReader:
    """Reads samples by row through a small cache of open files. One for each process."""

    index: ShardIndex
    _files: OrderedDict[int, int] = field(default_factory=OrderedDict)  # shard number -> file descriptor

    def read(self, row: int) -> bytes:
        """The image bytes of a row of the table.

        Raises:
            DataError: the shard is missing, of another size than the index says, or cannot be read.
        """
        record = self.index.table[row]
        number, offset, length = int(record["shard"]), int(record["offset"]), int(record["length"])
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
        shard = self.index.folder / self.index.shards[record["shard"]].name
        return f"{shard}: key {self.index.key(row)!r} at byte {record['offset']}"

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _file(self, number: int) -> int:
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        shard = self.index.shards[number]
        path = self.index.folder / shard.name
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _unopened(path, error) from None
        self._files[number] = file
        size = os.fstat(file).st_size
        if size != shard.bytes:
            raise _resized(path, size, shard)
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return file


def read_classes(folder: Path) -> list[str] | None:
    """The class list of ``folder``, or None if it has none."""
    try:
        return (folder / CLASSES).read_text("utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / CLASSES} cannot be read: {error}") from None


def _read_index(root: Path) -> tuple[dict, bytes]:
    path = root / INDEX
    if not root.is_dir():
        raise DataError(f"{root} is no folder of shards: build one: python -m data_prep build SRC {root}")
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
        found = content["format"]
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {_how_to_index(root)}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is no index ({error!r}): make it again: python -m data_prep index {root}") from None
    if found != FORMAT:
        raise DataError(f"{path} has format {found!r}, not {FORMAT!r}: make it again: python -m data_prep index {root}")
    return content, raw


def _how_to_index(root: Path) -> str:
    if (root / JOURNAL).exists():
        return "the build has not finished: run the same command again, it goes on where it was"
    if any(root.glob("*.tar")):
        return f"make it from the shards: python -m data_prep index {root}"
    return f"there are no shards: build some: python -m data_prep build SRC {root}"


def _map_table(root: Path, samples: int) -> np.ndarray:
    path = root / TABLE
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} is missing or broken ({error}): make it again: python -m data_prep index {root}"
        ) from None
    if table.shape != (samples,) or table.dtype.names != table_dtype(1).names:
        raise DataError(
            f"{path} has shape {table.shape}, but {INDEX} lists {samples} samples: "
            f"make both again: python -m data_prep index {root}"
        )
    return table


def _unopened(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: {error.strerror}: restore the shard, or index what is left: python -m data_prep index {path.parent}"
    )


def _resized(path: Path, size: int, shard: Shard) -> DataError:
    what = "truncated" if size < shard.bytes else "not the shard that was indexed"
    return DataError(
        f"{path} has {size} bytes, its index says {shard.bytes}: {what}; restore it, or index again: "
        f"python -m data_prep index {path.parent}"
    )


def _remedy(index: ShardIndex) -> str:
    return f"find every fault with: python -m data_prep verify {index.folder}"
