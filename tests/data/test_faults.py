"""Samples that cannot be read: replaced by a rule, whatever the ranks and workers, and reported."""

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ummim.data import Batch, DataConfig, Loader, ShardIndex, build_loader, fixed_batch
from ummim.data.faults import ATTEMPTS, Fault, SourceDown, replacements
from ummim.data.order import Pick
from ummim.data.samples import Samples
from ummim.data.shards import ShardReader
from ummim.errors import DataError
from ummim.masking import MaskConfig, PlanSampler

Arithmetic = Callable[..., SimpleNamespace]
SAMPLER = PlanSampler((4, 4), MaskConfig(), throw_ratio=0.5)


def loader(folder: Path, plan: SimpleNamespace, workers: int = 0, rank: int = 0, world: int = 1) -> Loader:
    data = DataConfig(str(folder), workers=workers, image_size=32, streams=3, window=2)
    return build_loader(ShardIndex.open(folder), data, SAMPLER, 7, plan, rank, world)


def overwrite(folder: Path, row: int) -> Path:
    """Make the image in ``row`` undecodable; returns its shard."""
    index = ShardIndex.open(folder)
    path = folder / index.shards[index.table["shard"][row]].name
    with path.open("r+b") as file:
        file.seek(int(index.table["offset"][row]))
        file.write(b"\0" * 64)
    return path


def samples(folder: Path, **options) -> Samples:
    return Samples(ShardIndex.open(folder), DataConfig(str(folder), image_size=32), SAMPLER, 7, **options)


def test_replacements_are_a_pure_function_and_spread() -> None:
    drawn = list(replacements(3, 1, 5, 1000))
    assert drawn == list(replacements(3, 1, 5, 1000))
    assert len(drawn) == ATTEMPTS
    assert all(0 <= row < 1000 for row in drawn)
    for other in ((4, 1, 5), (3, 2, 5), (3, 1, 6)):
        assert drawn != list(replacements(*other, 1000))
    first = [next(replacements(0, epoch, row, 10)) for epoch in range(200) for row in range(10)]
    assert np.bincount(first, minlength=10).min() > 140  # of 200 expected
    assert all(row not in replacements(0, 0, row, 3) for row in range(3))
    assert list(replacements(0, 0, 0, 1)) == []


def test_replacements_are_pinned() -> None:
    """Another rule would replay other batches than those that runs have trained on: change it only with a reason."""
    assert list(islice(replacements(0, 0, 5, 100), 4)) == [47, 30, 10, 59]


def test_an_undecodable_image_is_replaced_and_reported(folder: Path) -> None:
    index = ShardIndex.open(folder)
    path = overwrite(folder, 9)
    instead = next(replacements(7, 2, 9, len(index)))
    batch = samples(folder).batch([Pick(2, 9, 0), Pick(2, 3, 1)])
    expected = samples(folder).batch([Pick(2, instead, 0), Pick(2, 3, 1)])
    assert torch.equal(batch.images, expected.images)
    assert torch.equal(batch.plan.kept, expected.plan.kept)
    assert torch.equal(batch.labels, expected.labels)
    assert batch.keys == expected.keys
    offset = int(index.table["offset"][9])
    reason = "the image cannot be decoded: not an image of a format that is read"
    assert batch.faults == (Fault(2, 9, path.name, index.key(9), offset, reason, 0, index.key(instead)),)
    assert expected.faults == ()


def test_a_bad_replacement_is_replaced_in_turn_and_both_are_reported(folder: Path) -> None:
    overwrite(folder, 9)
    first, second = islice(replacements(7, 0, 9, 26), 2)
    overwrite(folder, first)
    batch = samples(folder).batch([Pick(0, 9, 0)])
    assert batch.keys == [ShardIndex.open(folder).key(second)]
    told = [(fault.row, fault.attempt, fault.replacement) for fault in batch.faults]
    assert told == [(9, 0, batch.keys[0]), (first, 1, batch.keys[0])]


def damage(folder: Path, kind: str) -> None:
    """Damage one shard of seven in one way."""
    path = folder / "shard-000001.tar"
    if kind == "vanished":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if kind == "cut" else path.stat().st_size + 512)


@pytest.mark.parametrize("kind", ["vanished", "cut", "grown"])
def test_every_sample_of_a_bad_shard_is_replaced_whatever_the_ranks_and_workers(
    folder: Path, arithmetic: Arithmetic, kind: str
) -> None:
    damage(folder, kind)

    def seen(batches: list[Batch]) -> tuple[list[str], list[int], list[Fault]]:
        sums = [image.sum().item() for batch in batches for image in batch.images]
        return [k for b in batches for k in b.keys], sums, [fault for batch in batches for fault in batch.faults]

    reference = seen(list(loader(folder, arithmetic(1, 1, 8))))
    index = ShardIndex.open(folder)
    first, last = index.first[1:3].tolist()
    lost = {index.key(row) for row in range(first, last)}
    assert not lost & set(reference[0])
    assert {fault.key for fault in reference[2]} == lost
    assert {fault.shard for fault in reference[2]} == {"shard-000001.tar"}
    for accumulation, world, micro, workers in [(1, 1, 8, 2), (2, 2, 2, 0), (1, 4, 2, 1)]:
        plan = arithmetic(accumulation, world, micro)
        ranks = [list(loader(folder, plan, workers, rank, world)) for rank in range(world)]
        turns = [ranks[rank][i] for i in range(6 * accumulation) for rank in range(world)]
        assert seen(turns) == reference


def test_a_shard_cut_while_it_is_read_costs_what_lies_beyond_the_cut(folder: Path) -> None:
    reading, index = samples(folder), ShardIndex.open(folder)
    rows = range(4)  # of the first shard
    assert reading.batch([Pick(0, row, 0) for row in rows]).faults == ()
    os.truncate(folder / "shard-000000.tar", int(index.table["offset"][2]) + 10)
    batch = reading.batch([Pick(0, row, 0) for row in rows])
    assert {2, 3} <= {fault.row for fault in batch.faults} <= set(rows)
    assert all("cut while in use" in fault.reason for fault in batch.faults)
    reading.reader.close()


def test_where_nothing_can_be_read_the_batch_is_black_and_says_so(folder: Path) -> None:
    for path in folder.glob("*.tar"):
        path.unlink()
    batch = samples(folder).batch([Pick(0, 3, 0), Pick(0, 4, 1)])
    assert not batch.images.any()
    assert batch.plan.visible.shape == (2, 4)
    assert len(batch.faults) == 1 + ATTEMPTS + 1
    assert {fault.replacement for fault in batch.faults} == {None}
    assert "No such file" in batch.faults[0].reason
    with pytest.raises(DataError, match=f"{folder}: no image can be read; the first that was tried: .*No such file"):
        fixed_batch(ShardIndex.open(folder), DataConfig(str(folder), image_size=32), SAMPLER, 0, 4)


@pytest.mark.parametrize("error", [DataError, SourceDown])
def test_a_source_that_is_gone_is_not_asked_for_ever(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[DataError]
) -> None:
    """Each attempt may take as long as a server takes not to answer; once it is known to be down, none is made."""
    asked = []

    def read(self: ShardReader, row: int) -> bytes:
        asked.append(row)
        raise error("http://host/shard-000000.tar: no answer for 30 s")

    monkeypatch.setattr(ShardReader, "read", read)
    reading = samples(folder)
    batches = [reading.batch([Pick(0, row, 0) for row in rows]) for rows in ((3, 4, 5), (6, 7))]
    assert asked == ([3] if error is SourceDown else [3, *replacements(7, 0, 3, 26)])
    assert "no answer for 30 s" in batches[0].faults[0].reason
    assert {fault.row for batch in batches for fault in batch.faults} == {*asked, 3, 4, 5, 6, 7}
    assert {fault.replacement for batch in batches for fault in batch.faults} == {None}


def test_known_bad_rows_are_not_tried(folder: Path) -> None:
    sound = samples(folder).batch([Pick(0, next(replacements(7, 0, 9, 26)), 4)])
    batch = samples(folder, bad={9}).batch([Pick(0, 9, 4)])
    assert torch.equal(batch.images, sound.images)
    assert batch.keys == sound.keys
    assert [fault.row for fault in batch.faults] == [9]


def test_figures_replace_bad_images_too(folder: Path) -> None:
    overwrite(folder, 0)  # the first of its class, which the figure shows
    batch = fixed_batch(ShardIndex.open(folder), DataConfig(str(folder), image_size=32), SAMPLER, 0, 5)
    assert len(batch.keys) == 5
    assert [fault.row for fault in batch.faults] == [0]


def test_faults_travel_with_a_batch_between_devices(folder: Path) -> None:
    overwrite(folder, 9)
    batch = samples(folder).batch([Pick(0, 9, 0)])
    assert batch.to("cpu").faults == batch.faults != ()
    assert replace(batch, keys=[]).faults == batch.faults
