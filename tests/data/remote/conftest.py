"""Shards of arbitrary bytes, a server of them, and a cache."""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from tests.data.remote.server import Server
from ummim.data import download
from ummim.data.cache import ShardCache
from ummim.data.index_files import FORMAT, Shard, table_dtype


def write_shards(folder: Path, shards: int = 6, samples: int = 4, seed: int = 0) -> Path:
    """``shards`` files of 20,000 bytes with their index; what is in them is neither a tar nor an image."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(seed)
    entries, rows = [], []
    for number in range(shards):
        data, name = draw.randbytes(20_000), f"shard-{number:06d}.tar"
        (folder / name).write_bytes(data)
        entries.append(asdict(Shard(name, len(data), hashlib.sha256(data).hexdigest(), samples)))
        rows += [(f"cat/{number}-{i}", number, 512 + 4096 * i, 1000 + i, 0) for i in range(samples)]
    np.save(folder / "index.npy", np.array(rows, table_dtype(20)))
    (folder / "classes.txt").write_text("cat\n")
    checksum = hashlib.sha256((folder / "index.npy").read_bytes()).hexdigest()
    content = {"format": FORMAT, "samples": len(rows), "labelled": True, "source": None, "table_sha256": checksum}
    (folder / "index.json").write_text(json.dumps({**content, "shards": entries}))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "served")


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(shards) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10**6, retry_seconds=60)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_LONGEST_PAUSE", 0.01)


@pytest.fixture
def short_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    """For servers that fall silent. On a busy machine, a sound one may take as long to answer, and is asked twice."""
    monkeypatch.setattr(download, "_STALL_SECONDS", 0.3)
