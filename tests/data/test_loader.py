from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ummim.data import Batch, DataConfig, Loader, ShardIndex, build_loader, fixed_batch
from ummim.data.normalise import normalise
from ummim.data.order import MicroBatches, Pick
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


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pixels_colours_lie_together_until_they_are_normalised(
    folder: Path, arithmetic: Arithmetic, workers: int, tmp_path: Path
) -> None:
    """Views are made so; to turn each around would be 4% of a worker's time. Models and files get the usual layout."""
    batch = next(iter(loader(folder, arithmetic(1, 1, 8), workers=workers)))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    pixels = normalise(batch.images)
    assert pixels.is_contiguous()
    assert torch.equal(pixels, normalise(batch.images.contiguous()))
    batch.save(tmp_path / "batch.safetensors", {"step": 3})
    again, told = Batch.load(tmp_path / "batch.safetensors")
    assert torch.equal(again.images, batch.images)
    assert told["step"] == 3


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


def test_state_is_a_step_whatever_the_ranks_and_workers(folder: Path, arithmetic: Arithmetic) -> None:
    whole = by_key(list(loader(folder, arithmetic(1, 1, 8))))
    first = loader(folder, arithmetic(2, 1, 4), workers=1)
    batches = iter(first)
    for _ in range(5):  # two steps and a half
        next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert first.state_dict() == {"seed": 7, "step": 2}
    second = loader(folder, arithmetic(1, 1, 8))
    second.load_state_dict(first.state_dict())
    assert len(second) == 4
    assert by_key(list(second)) == whole[2 * 8 :]
    with pytest.raises(DataError, match="seed 8"):
        second.load_state_dict({"seed": 8, "step": 2})


def test_a_resume_in_the_middle_draws_up_no_batch_before_it(
    folder: Path, arithmetic: Arithmetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original = MicroBatches.__getitem__

    def spy(self: MicroBatches, number: int) -> list[Pick]:
        asked.append(number)
        return original(self, number)

    monkeypatch.setattr(MicroBatches, "__getitem__", spy)
    batches = iter(loader(folder, arithmetic(2, 1, 4, stop=10**7), start=9_000_000))
    next(batches)
    assert asked == [18_000_000]


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
