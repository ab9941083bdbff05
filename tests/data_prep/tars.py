"""Tars as other programs write them, and ways to break them."""

import io
import tarfile
from pathlib import Path

from data_prep.__main__ import main
from tests.data.pictures import encode, picture

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members, kind: int = tarfile.GNU_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def members_of(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def image(seed: int = 0) -> bytes:
    return encode(picture(seed, (12, 10)))


def labelled(folder: Path, shards: int = 3, each: int = 4) -> Path:
    """Shards of small labelled images with their index: members k<n>.cls and k<n>.jpg, two classes."""
    for s in range(shards):
        numbers = range(s * each, (s + 1) * each)
        members = [m for n in numbers for m in ((f"k{n:03d}.cls", b"%d" % (n % 2)), (f"k{n:03d}.jpg", image(n)))]
        write_tar(folder / f"shard-{s}.tar", members)
    (folder / "classes.txt").write_text("cat\ndog\n")
    assert run("index", folder) == 0
    return folder


def foreign(folder: Path, shards: int = 2, each: int = 3, label: bool = True) -> Path:
    """Shards as other tools write them: several members a sample, the image in the middle."""
    for s in range(shards):
        members: Members = [("__meta__", b"made elsewhere")]
        for i in range(each):
            key = f"{s:02d}{i:04d}"
            members += [(f"{key}.cls", b"%d\n" % (i % 2))] if label else []
            members += [(f"{key}.JPG", image(10 * s + i)), (f"{key}.json", b"{}"), (f"{key}.seg.png", b"?")]
        write_tar(folder / f"{s:05d}.tar", members)
    return folder


def run(*arguments: object) -> int:
    """Run a command of ``data_prep`` in this process; returns its exit code."""
    return main([*map(str, arguments), "--workers", "1"])


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
