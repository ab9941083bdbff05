"""Where shards go: a folder, or a URL that finished shards are uploaded to from a folder of their own."""

import hashlib
import json
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data_prep.locations import attempt, connect, read
from ummim.data.shards import INDEX, JOURNAL, ShardIndex
from ummim.data.urls import basename, is_url, is_web, join, local_path
from ummim.errors import DataError

_PROBE = ".ummim-probe"
_UPLOADS = 4  # shards at a time

Value = TypeVar("Value")


@dataclass(frozen=True)
class Target:
    """Attributes:
    folder: where files are written, and the journal lies: the destination itself, or the staging folder of ``url``.
    url: destination that is no local folder, or None.
    """

    folder: Path
    url: str | None

    def __str__(self) -> str:
        return self.url or str(self.folder)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file that the destination holds, by name."""
        if self.url is None:
            found = self.folder.iterdir() if self.folder.is_dir() else []
            return {path.name: path.stat().st_size for path in found if path.is_file()}
        fs, root = connect(self.url)
        fs.invalidate_cache()
        try:
            listing = attempt(self.url, lambda: fs.ls(root, detail=True))
        except FileNotFoundError:
            return {}
        return {basename(info["name"]): info["size"] or 0 for info in listing if info["type"] == "file"}

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)
        self.withdraw(name)

    def withdraw(self, name: str) -> None:
        """Remove a file from the URL alone."""
        if self.url is not None:
            fs, root = connect(self.url)
            attempt(self.url, lambda: fs.rm_file(join(root, name)) if fs.exists(join(root, name)) else None)

    def check_writable(self) -> None:
        """Write an empty file and remove it. Raises OSError or DataError."""
        if self.url is not None:
            fs, root = connect(self.url)
            path = join(root, _PROBE)
            attempt(join(self.url, _PROBE), lambda: fs.pipe_file(path, b""))
            attempt(join(self.url, _PROBE), lambda: fs.rm_file(path))

    def publish(self, name: str) -> None:
        """Upload a file that is finished, and check that all of it arrived; the local one goes.

        Object stores show a file under its name only when it is whole.

        Raises:
            DataError: the destination cannot be reached, or holds another number of bytes than were sent.
        """
        if self.url is None:
            return
        path, (fs, root) = self.folder / name, connect(self.url)
        url, size = join(self.url, name), path.stat().st_size

        def upload() -> None:
            fs.makedirs(root, exist_ok=True)
            fs.put_file(str(path), join(root, name))
            fs.invalidate_cache()
            arrived = fs.size(join(root, name))
            if arrived != size:
                raise OSError(f"{arrived} bytes arrived of {size}")

        attempt(url, upload)
        path.unlink()

    def uploading(self, jobs: Iterable[tuple[Value, list[str]]]) -> Iterator[Value]:
        """The value of each job (value, names of its files), in order, when its files have been published."""
        if self.url is None:
            yield from (value for value, _ in jobs)
            return
        waiting: deque[tuple[Value, list[Future[None]]]] = deque()
        with ThreadPoolExecutor(_UPLOADS) as threads:
            try:
                for value, names in jobs:
                    waiting.append((value, [threads.submit(self.publish, name) for name in names]))
                    while len(waiting) > _UPLOADS:
                        yield _arrived(*waiting.popleft())
                while waiting:
                    yield _arrived(*waiting.popleft())
            finally:
                threads.shutdown(cancel_futures=True)

    def holds(self, source: str) -> int | None:
        """Samples of the finished build that lies here, if it is one of ``source``."""
        try:
            if self.url is None:
                index = ShardIndex.open(self.folder)
                index.check()
                return len(index) if index.source == source and not (self.folder / JOURNAL).exists() else None
            content = json.loads(read(join(self.url, INDEX)))
            sizes = self.sizes()
            whole = all(sizes.get(shard["name"]) == shard["bytes"] for shard in content["shards"])
            return int(content["samples"]) if whole and content["source"] == source else None
        except (FileNotFoundError, DataError, ValueError, KeyError, TypeError):
            return None


def open_target(dst: str, staging: Path | None) -> Target:
    """The target ``dst``, a folder or URL. Shards bound for a URL are made in ``staging``.

    Raises:
        DataError: a URL that takes no files, or a staging folder for a ``dst`` that needs none.
    """
    dst = local_path(dst)
    if not is_url(dst):
        if staging is not None:
            raise DataError(f"--staging is for destinations that are URLs; {dst} is a folder")
        return Target(Path(dst), None)
    if is_web(dst):
        raise DataError(f"{dst}: nothing can be written over http: give a folder, or an s3:// or gs:// URL")
    connect(dst)  # known, and its package installed
    return Target(staging or _default_staging(dst), dst.rstrip("/"))


def _default_staging(url: str) -> Path:
    name = f"ummim-build-{os.getuid()}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise DataError(f"{folder} belongs to another user: choose a folder with --staging")
    return folder


def _arrived(value: Value, uploads: list[Future[None]]) -> Value:
    for upload in uploads:
        upload.result()
    return value
