"""One tar shard on its way to disk."""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from webdataset import TarWriter

from data_prep.files import atomic_write
from ummim.data.shards import UNLABELLED, Shard


class ShardWriter:
    """Writes samples to a tar that appears as ``path`` when closed; the same samples give the same bytes."""

    def __init__(self, path: Path) -> None:
        self.path, self.samples = path, 0
        self._stack = ExitStack()
        self._file = _Hashed(self._stack.enter_context(atomic_write(path)))
        self._tar = self._stack.enter_context(TarWriter(self._file, user="", group="", encoder=False, mtime=0))

    @property
    def size(self) -> int:
        """Bytes written so far, without the end-of-archive mark."""
        return self._tar.tarstream.offset

    def add(self, key: str, extension: str, data: bytes, label: int) -> None:
        sample = {"__key__": key, extension: data}
        if label != UNLABELLED:
            sample["cls"] = b"%d" % label
        self._tar.write(sample)
        self.samples += 1

    def close(self) -> Shard:
        self._stack.close()
        return Shard(self.path.name, self._file.bytes, self._file.digest.hexdigest(), self.samples)

    def abort(self, error: BaseException) -> None:
        """Leave nothing behind."""
        self._stack.__exit__(type(error), error, error.__traceback__)


class _Hashed:
    """A file that hashes and counts what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self.file.write(data)
