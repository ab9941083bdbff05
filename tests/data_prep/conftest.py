"""Folders of images, built shards, and a small disk."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from data_prep import journal
from data_prep.__main__ import main
from tests.data.pictures import write_tree


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests survive no power cut, and a sync waits for whatever else the disk is doing."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """24 JPEGs in two class folders."""
    return write_tree(tmp_path / "images")


@pytest.fixture
def shards(tree: Path, tmp_path: Path) -> Path:
    """``tree`` in shards of five samples."""
    folder = tmp_path / "shards"
    assert main(["build", str(tree), str(folder), "--shard-count", "5", "--workers", "1"]) == 0
    return folder


class SmallDisk(NamedTuple):
    """A folder that fills up after some shards, until ``enlarge`` is called."""

    folder: Path
    enlarge: Callable[[], object]


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    """A tmpfs of 100 kB; where mounting is not permitted, a disk on which the third shard meets /dev/full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    if mounted:
        larger = ["mount", "-o", "remount,size=10m", str(folder)]
        yield SmallDisk(folder, lambda: subprocess.run(larger, check=True))
        subprocess.run(["umount", str(folder)], check=True)
        return
    print("mounting a tmpfs is not permitted here: a shard that is a link to /dev/full stands in")
    monkeypatch.setattr(journal, "TEMPORARY", ".kept")  # else the link would be cleared away as a leftover
    link = folder / "chunk-000002-0.tar.tmp.tmp"
    link.symlink_to("/dev/full")
    yield SmallDisk(folder, lambda: link.unlink(missing_ok=True))
