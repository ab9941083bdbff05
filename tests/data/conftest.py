"""Built shards and the arithmetic of a run."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep.__main__ import main
from tests.data.pictures import write_tree


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests survive no power cut, and a sync waits for whatever else the disk is doing."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """26 labelled images in shards of 4, 4, 4, 4, 4, 4 and 2 samples."""
    tree = write_tree(tmp_path / "images", each=13)
    arguments = ["build", str(tree), str(tmp_path / "shards"), "--shard-count", "4", "--workers", "1"]
    assert main(arguments) == 0
    return tmp_path / "shards"


@pytest.fixture
def arithmetic() -> Callable[..., SimpleNamespace]:
    """The part of a run's plan that the loader reads."""

    def make(accumulation: int, world_size: int, micro_batch: int, samples: int = 26, stop: int = 6) -> SimpleNamespace:
        batch = accumulation * world_size * micro_batch
        return SimpleNamespace(
            accumulation=accumulation,
            micro_batch=micro_batch,
            global_batch=batch,
            steps_per_epoch=samples // batch,
            stop_step=stop,
        )

    return make
