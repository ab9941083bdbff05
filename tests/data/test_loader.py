import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT
from tests.data.pictures import is_running
from ummim.data import Batch, DataConfig, Loader, ShardIndex, build_loader, fixed_batch
from ummim.errors import DataError, RecipeError
from ummim.masking import MaskConfig, PlanSampler, sample_seed

Arithmetic = Callable[..., SimpleNamespace]
SAMPLER = PlanSampler((4, 4), MaskConfig(), throw_ratio=0.5)


def loader(
    folder: Path,
    plan: SimpleNamespace,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    sampler: PlanSampler = SAMPLER,
) -> Loader:
    data = DataConfig(str(folder), workers=workers, image_size=32, streams=3, window=2)
    return build_loader(ShardIndex.open(folder), data, sampler, 7, plan, rank, world, start)


def by_key(batches: list[Batch]) -> list[tuple]:
    """Every sample of the batches with all that belongs to it, in a comparable form."""
    return [
        (key, batch.images[i].sum().item(), batch.images[i, :, 3, 5].tolist(), batch.labels[i].item(),
         batch.plan.visible[i].tolist(), batch.plan.kept[i].tolist(), batch.plan.thrown[i].tolist())
        for batch in batches
        for i, key in enumerate(batch.keys)
    ]  # fmt: skip


@pytest.mark.parametrize(("accumulation", "world", "micro", "workers"), [(1, 1, 8, 2), (2, 2, 2, 0), (1, 4, 2, 1)])
def test_global_batches_do_not_depend_on_ranks_and_workers(
    folder: Path, arithmetic: Arithmetic, accumulation: int, world: int, micro: int, workers: int
) -> None:
    reference = by_key(list(loader(folder, arithmetic(1, 1, 8))))
    plan = arithmetic(accumulation, world, micro)
    ranks = [list(loader(folder, plan, workers, rank, world)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {6 * accumulation}
    turns = [ranks[rank][i] for i in range(6 * accumulation) for rank in range(world)]
    assert by_key(turns) == reference


@pytest.mark.parametrize(("accumulation", "world", "micro", "workers"), [(2, 1, 4, 2), (1, 2, 4, 1), (2, 2, 2, 0)])
def test_masks_shared_by_neighbours_do_not_depend_on_ranks_and_workers(
    folder: Path, arithmetic: Arithmetic, accumulation: int, world: int, micro: int, workers: int
) -> None:
    """Four neighbours in a global batch of eight, as GreenMIM shares masks."""
    sampler = PlanSampler((8, 8), MaskConfig(shared_by=4), throw_ratio=0.5)
    reference = by_key(list(loader(folder, arithmetic(1, 1, 8), sampler=sampler)))  # 6 global batches
    masks = [str(row[-3:]) for row in reference]
    groups = [set(masks[i : i + 4]) for i in range(0, 48, 4)]
    assert all(len(group) == 1 for group in groups)
    assert len(set(masks)) == 12  # another mask for every group, in the second epoch too
    ranks = [
        list(loader(folder, arithmetic(accumulation, world, micro), workers, rank, world, sampler=sampler))
        for rank in range(world)
    ]
    turns = [ranks[rank][i] for i in range(6 * accumulation) for rank in range(world)]
    assert by_key(turns) == reference
    for batch in turns:  # every micro-batch lies in one group, and says so
        assert batch.plan.shared == tuple(batch.plan.visible[0].tolist())


def test_batches_hold_what_they_say(folder: Path, arithmetic: Arithmetic) -> None:
    batches = list(loader(folder, arithmetic(1, 1, 8)))
    first = batches[0]
    assert first.images.dtype == torch.uint8
    assert first.images.shape == (8, 3, 32, 32)
    assert first.labels.dtype == torch.int64
    assert [["bird", "cat"][label] for label in first.labels] == [key.split("/")[0] for key in first.keys]
    assert first.plan.visible.shape == (8, 4)
    assert first.plan.thrown.shape == (8, 8)
    for i, key in enumerate(first.keys):
        assert first.plan.visible[i].tolist() == SAMPLER(sample_seed(7, 0, key)).visible.tolist()
    epochs = [[key for batch in batches[a : a + 3] for key in batch.keys] for a in (0, 3)]
    assert all(len(set(keys)) == 24 for keys in epochs)  # 26 samples, two dropped
    assert epochs[0] != epochs[1]
    moved = first.to("cpu", non_blocking=True)
    assert torch.equal(moved.images, first.images)
    assert moved.keys == first.keys


@pytest.mark.parametrize("start", [1, 3, 5, 6])
def test_a_resumed_loader_goes_on_exactly(folder: Path, arithmetic: Arithmetic, start: int) -> None:
    whole = by_key(list(loader(folder, arithmetic(2, 1, 4))))
    resumed = loader(folder, arithmetic(2, 1, 4), start=start)
    assert len(resumed) == (6 - start) * 2
    assert by_key(list(resumed)) == whole[start * 8 :]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_left_alone(folder: Path, arithmetic: Arithmetic, workers: int) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(loader(folder, arithmetic(1, 1, 8), workers))
    fixed_batch(ShardIndex.open(folder), DataConfig(str(folder), image_size=32), SAMPLER, 0, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_fixed_batch_is_fixed(folder: Path) -> None:
    index, data = ShardIndex.open(folder), DataConfig(str(folder), image_size=32)
    batch = fixed_batch(index, data, SAMPLER, 0, 5)
    assert len(set(batch.keys)) == 5
    assert set(batch.labels.tolist()) == set(range(len(index.classes or [])))  # every class is shown
    assert by_key([batch]) == by_key([fixed_batch(index, data, SAMPLER, 0, 5)])
    other = fixed_batch(index, data, SAMPLER, 1, 5)
    assert torch.equal(batch.images, other.images)  # no random crop
    assert not torch.equal(batch.plan.visible, other.plan.visible)
    assert len(fixed_batch(index, data, SAMPLER, 0, 100).keys) == 26


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_jpeg_is_one_message(folder: Path, arithmetic: Arithmetic, workers: int) -> None:
    index = ShardIndex.open(folder)
    offset = int(index.table["offset"][9])
    with (folder / "shard-000002.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * 64)
    with pytest.raises(DataError) as caught:
        list(loader(folder, arithmetic(1, 1, 13), workers))
    assert str(caught.value) == (
        f"{folder}/shard-000002.tar: key {index.key(9)!r} at byte {offset}: the image cannot be decoded: "
        f"not an image that Pillow knows; find every fault with: python -m data_prep verify {folder}"
    )
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_and_a_vanished_shard_are_one_message(folder: Path, arithmetic: Arithmetic, workers: int) -> None:
    path = folder / "shard-000001.tar"
    os.truncate(path, 3000)
    with pytest.raises(DataError, match=f"{path} has 3000 bytes, its index says .*: truncated"):
        list(loader(folder, arithmetic(1, 1, 13), workers))
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: No such file or directory"):
        list(loader(folder, arithmetic(1, 1, 13), workers))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("reading", [True, False])
def test_a_killed_worker_is_an_error_and_not_a_hang(folder: Path, arithmetic: Arithmetic, reading: bool) -> None:
    batches = iter(loader(folder, arithmetic(1, 1, 2, stop=100_000), workers=2))
    next(batches)
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    with pytest.raises(DataError, match=f"data worker process {worker.pid} was killed by SIGKILL: .* lower data.wor"):
        os.kill(worker.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if reading:
                next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_a_crash_elsewhere_does_not_hang_on_workers_at_exit(folder: Path) -> None:
    script = (
        "import sys\n"
        "from types import SimpleNamespace\n"
        "from ummim.data import *\n"
        "from ummim.masking import *\n"
        "plan = SimpleNamespace(accumulation=1, micro_batch=2, global_batch=2, steps_per_epoch=13, stop_step=10**6)\n"
        "data = DataConfig(sys.argv[1], workers=2, image_size=32)\n"
        "sampler = PlanSampler((4, 4), MaskConfig())\n"
        "batches = iter(build_loader(ShardIndex.open(sys.argv[1]), data, sampler, 0, plan, 0, 1))\n"
        "next(batches)\n"
        "sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], timeout=60, cwd=ROOT)
    assert done.returncode == 7


def test_ctrl_c_and_preemption_are_left_to_the_trainer(folder: Path, arithmetic: Arithmetic) -> None:
    batches = iter(loader(folder, arithmetic(1, 1, 2, stop=2000), workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    for kind in (signal.SIGINT, signal.SIGTERM):
        assert worker.pid is not None
        os.kill(worker.pid, kind)
        for _ in range(20):
            next(batches)
    assert worker.is_alive()
    batches.close()  # type: ignore[attr-defined]
    worker.join(10)
    assert not worker.is_alive()


def test_leaving_early_ends_the_workers(folder: Path, arithmetic: Arithmetic) -> None:
    for _ in loader(folder, arithmetic(1, 1, 2, stop=100_000), workers=2):
        break
    assert not multiprocessing.active_children()


def test_workers_end_with_a_trainer_that_is_killed(folder: Path) -> None:
    script = (
        "import multiprocessing, sys, time\n"
        "from types import SimpleNamespace\n"
        "from ummim.data import *\n"
        "from ummim.masking import *\n"
        "plan = SimpleNamespace(accumulation=1, micro_batch=2, global_batch=2, steps_per_epoch=13, stop_step=10**6)\n"
        "data = DataConfig(sys.argv[1], workers=2, image_size=32)\n"
        "sampler = PlanSampler((4, 4), MaskConfig())\n"
        "for batch in build_loader(ShardIndex.open(sys.argv[1]), data, sampler, 0, plan, 0, 1):\n"
        "    print(*(p.pid for p in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as trainer:
        assert trainer.stdout is not None
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        trainer.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "worker processes outlive the trainer"
        time.sleep(0.1)


def test_what_does_not_fit_is_refused(folder: Path, arithmetic: Arithmetic) -> None:
    with pytest.raises(DataError, match="holds 26 samples, fewer than one global batch of 32"):
        loader(folder, arithmetic(1, 1, 32))
    with pytest.raises(ValueError, match="2 steps an epoch do not fit 26 samples"):
        loader(folder, arithmetic(1, 1, 8, samples=16))
    with pytest.raises(ValueError, match="1 x 2 x 8 is not 8"):
        loader(folder, arithmetic(1, 1, 8), world=2)
    with pytest.raises(RecipeError):
        data = DataConfig(str(folder), workers=-1)
        build_loader(ShardIndex.open(folder), data, SAMPLER, 0, arithmetic(1, 1, 8), 0, 1)
