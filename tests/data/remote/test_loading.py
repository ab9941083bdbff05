from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.data.remote.server import Server
from ummim.data import Batch, DataConfig, ShardIndex, build_loader, download, fixed_batch
from ummim.masking import MaskConfig, PlanSampler

SAMPLER = PlanSampler((4, 4), MaskConfig(), throw_ratio=0.5)


def batches(data: DataConfig, plan: SimpleNamespace, start: int = 0) -> list[Batch]:
    index = ShardIndex.open(data.shards, data.shard_cache())
    return list(build_loader(index, data, SAMPLER, 7, plan, 0, 1, start))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_server_gives_the_batches_of_a_local_folder(
    folder: Path,
    tmp_path: Path,
    arithmetic: Callable[..., SimpleNamespace],
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(download, "_STALL_SECONDS", 2.0)  # longer than a busy machine takes to answer: it counts
    local = batches(DataConfig(str(folder), workers=0, image_size=32, streams=3, window=2), arithmetic(1, 1, 8))
    with Server(folder) as server:
        server.pace = 0.001
        faults: list[str | int] = ["drop", 503, "corrupt", "stall"]
        for number in range(7):
            server.faults[f"shard-{number:06d}.tar"] = [faults[number % 4]]
        for start in (0, 4):  # with an empty cache, and in a restarted job with a warm one
            data = DataConfig(
                server.url, workers=workers, image_size=32, streams=3, window=2, cache=str(tmp_path / "cache")
            )
            remote = batches(data, arithmetic(1, 1, 8), start)
            for here, there in zip(local[start:], remote, strict=True):
                assert here.keys == there.keys
                assert torch.equal(here.images, there.images)
                assert not there.faults
        assert max(count for name, count in server.counts().items() if name.endswith(".tar")) == 2


def test_fixed_images_are_those_of_a_local_folder(folder: Path, tmp_path: Path) -> None:
    with Server(folder) as server:
        data = DataConfig(server.url, image_size=32, cache=str(tmp_path / "cache"))
        remote = fixed_batch(ShardIndex.open(server.url, data.shard_cache()), data, SAMPLER, 0, 5)
    local = fixed_batch(ShardIndex.open(folder), DataConfig(str(folder), image_size=32), SAMPLER, 0, 5)
    assert torch.equal(remote.images, local.images)
