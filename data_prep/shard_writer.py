"""One tar shard on its way to disk."""

import hashlib
import tarfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.convert import Stored
from ummim.atomic import atomic_write
from ummim.data.shards import UNLABELLED, Shard, table_dtype

_BUFFER = 2**20


class Finished(NamedTuple):
    """A shard that is written.

    Attributes:
        shard: its name, bytes, checksum and number of samples.
        rows: its part of the sample table, ``table_dtype``; ``shard`` is left 0.
        sizes: (samples, 2) uint32, width and height of each image, in pixels.
        kinds: how many images came as "JPEG RGB" and the like.
    """

    shard: Shard
    rows: np.ndarray
    sizes: np.ndarray
    kinds: dict[str, int]


class ShardWriter:
    """Writes samples to a tar that appears as ``path`` when closed; the same samples give the same bytes."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0  # bytes written so far, without the end-of-archive mark
        self._rows: list[tuple[bytes, int, int, int, int]] = []
        self._sizes: list[tuple[int, int]] = []
        self._kinds: dict[str, int] = {}
        self._digest = hashlib.sha256()
        self._buffer = bytearray()  # of the bytes written, those that are not yet in the file
        self._stack = ExitStack()
        self._file = self._stack.enter_context(atomic_write(path))

    @property
    def samples(self) -> int:
        return len(self._rows)

    def add(self, key: str, label: int, image: Stored) -> None:
        if label != UNLABELLED:
            self._member(f"{key}.cls", b"%d" % label)
        offset = self._member(f"{key}.{image.extension}", image.data)
        self._rows.append((key.encode(), 0, offset, len(image.data), label))
        self._sizes.append((image.width, image.height))
        self._kinds[image.kind] = self._kinds.get(image.kind, 0) + 1

    def close(self) -> Finished:
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.size + end) % tarfile.RECORDSIZE))
        self._flush()
        self._stack.close()
        shard = Shard(self.path.name, self.size, self._digest.hexdigest(), self.samples)
        rows = np.array(self._rows, table_dtype(max(len(row[0]) for row in self._rows)))
        return Finished(shard, rows, np.array(self._sizes, np.uint32), self._kinds)

    def abort(self, error: BaseException) -> None:
        """Leave nothing behind."""
        self._stack.__exit__(type(error), error, error.__traceback__)

    def _member(self, name: str, data: bytes) -> int:
        """Append a file; returns the offset of its data."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o444
        short = name.isascii() and len(name) <= tarfile.LENGTH_NAME  # then both formats give the same bytes
        self._write(info.tobuf(tarfile.USTAR_FORMAT if short else tarfile.PAX_FORMAT, "utf-8"))
        offset = self.size
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def _write(self, data: bytes) -> None:
        self.size += len(data)
        self._buffer += data
        if len(self._buffer) >= _BUFFER:
            self._flush()

    def _flush(self) -> None:
        self._digest.update(self._buffer)
        self._file.write(self._buffer)
        self._buffer.clear()
