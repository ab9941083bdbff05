"""What every test shares: one thread per process (two cores, many processes) and a place for tiny recipes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ummim.engine.zero import World

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]

TINY_MAE = """
description: a MAE small enough for a test
method:
  name: mae
  encoder: {patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}
  decoder: {embed_dim: 32, depth: 1, num_heads: 2}
epochs: 4
global_batch: 8
micro_batch: 8
optim: {base_lr: 1.0e-2, warmup_epochs: 1}
data: {shards: SHARDS, image_size: 32, workers: 0, streams: 2, window: 1}
zero_stage: 1
precision: fp32
log_every: 1
checkpoint_every: 4
figure_every: 2
figure_images: 2
tensorboard: false
"""

TINY_UM_MAE = """
description: a UM-MAE small enough for a test
method:
  name: um_mae
  encoder: {embed_dim: 16, depths: [1, 1, 2, 1], num_heads: [1, 2, 4, 8], window_size: 4, pos_mlp_dim: 8}
  decoder: {embed_dim: 32, depth: 1, num_heads: 2}
mask: {kind: uniform, ratio: 0.75, secondary_ratio: 0.25}
throw_ratio: 0.5
epochs: 4
global_batch: 8
micro_batch: 8
optim: {base_lr: 1.0e-2, warmup_epochs: 1}
data: {shards: SHARDS, image_size: 64, workers: 0, streams: 2, window: 1}
zero_stage: 2
precision: fp32
log_every: 1
checkpoint_every: 4
figure_every: 2
figure_images: 2
tensorboard: false
"""

LONGEST = (  # files, by their time
    "test_jobs_on_hosts.py",
    "test_parallel.py",
    "test_train.py",
    "test_run.py",
    "test_static_shapes.py",
    "test_stages.py",
    "test_watchdog.py",
    "test_attention_maps.py",
    "test_elastic.py",
    "test_cost.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: two workers that take file after file then end at about the same time."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile that has compiled nothing."""
    import torch

    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """This process as a world of its own; the variables that say so are gone again for processes that tests start.

    One for all files: DeepSpeed keeps the first process group that it sees, and fails on a second one.
    """
    from ummim.engine import zero

    with pytest.MonkeyPatch.context() as patch:
        for name in zero.RENDEZVOUS:
            patch.setenv(name, "")  # so that they are put back
            patch.delenv(name)
        patch.setenv("DS_ACCELERATOR", "cpu")
        found = zero.setup_distributed()
        for name in set(zero.RENDEZVOUS) - {"LOCAL_RANK"}:  # each engine asks for that one
            os.environ.pop(name)
        yield found
        zero.shutdown()


@pytest.fixture
def plain_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own linear: a ZeRO-3 engine that this process had in another test leaves one that counts otherwise."""
    import torch

    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


@pytest.fixture
def write_recipe(tmp_path: Path):
    """Write recipe text to a file, ``SHARDS`` replaced by a folder; returns the file."""

    def write(text: str, shards: Path | str = "nowhere", name: str = "tiny") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(text.replace("SHARDS", str(shards)) + f"output: {tmp_path / 'run'}\n")
        return path

    return write
