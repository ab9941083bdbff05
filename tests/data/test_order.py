import tracemalloc
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.plain_order import plain_order
from ummim.data.order import EpochOrder, MicroBatches
from ummim.data.shards import Shard, ShardIndex, table_dtype

sizes = st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any)
constants = st.tuples(st.integers(1, 6), st.integers(1, 4))  # streams, window


def index_of(counts: list[int]) -> ShardIndex:
    shards = tuple(Shard(f"{i}.tar", 0, "", n) for i, n in enumerate(counts))
    table = np.broadcast_to(np.zeros(1, table_dtype(1)), sum(counts))
    return ShardIndex(Path(), shards, first_of(counts), table, None, "", "", None)


def first_of(counts: list[int]) -> np.ndarray:
    return np.cumsum([0, *counts])


def whole(counts: list[int], seed: int, epoch: int, streams: int, window: int) -> np.ndarray:
    return EpochOrder(first_of(counts), seed, epoch, streams, window).rows(np.arange(sum(counts)))


@given(sizes, constants, st.integers(0, 2**40), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_any_positions_are_those_of_the_order_written_out(counts, const, seed, epoch, random) -> None:
    """One by one from the front, in any order, and twice over."""
    plain = plain_order(first_of(counts), seed, epoch, *const)
    order = EpochOrder(first_of(counts), seed, epoch, *const)
    assert len(order) == len(plain)
    positions = np.arange(len(order))
    assert [order.rows(positions[i : i + 1]).item() for i in positions] == plain.tolist()
    for _ in range(3):
        some = np.array(random.choices(positions.tolist(), k=random.randint(0, 40)), np.int64)
        assert np.array_equal(order.rows(some), plain[some])


@given(sizes, constants, st.integers(0, 2**40), st.integers(0, 1000))
def test_every_sample_comes_exactly_once(counts: list[int], const: tuple[int, int], seed: int, epoch: int) -> None:
    order = whole(counts, seed, epoch, *const)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(sum(counts)))


@given(sizes, constants, st.integers(0, 99))
def test_streams_take_turns_and_shuffle_within_windows(counts: list[int], const: tuple[int, int], seed: int) -> None:
    """Undo the turns: each stream must then hold its shards window by window, in an order given by the shards."""
    streams, window = const
    order = whole(counts, seed, 3, streams, window)
    shard_of = np.repeat(np.arange(len(counts)), counts)[order]
    lanes: list[list[int]] = [[] for _ in range(min(streams, len(counts)))]
    stream_of = {s: lane for lane, s in _dealt(counts, seed, streams)}
    expected_turn: list[int] = []
    sums = [sum(counts[s] for s in stream_of if stream_of[s] == lane) for lane in range(len(lanes))]
    for turn in range(max(sums)):
        expected_turn += [lane for lane in range(len(lanes)) if turn < sums[lane]]
    for shard in shard_of:
        lanes[stream_of[int(shard)]].append(int(shard))
    assert [stream_of[int(shard)] for shard in shard_of] == expected_turn
    for lane, found in enumerate(lanes):
        mine = [s for other, s in _dealt(counts, seed, streams) if other == lane]
        start = 0
        for w in range(0, len(mine), window):
            count = sum(counts[s] for s in mine[w : w + window])
            assert set(found[start : start + count]) <= set(mine[w : w + window])
            start += count


def _dealt(counts: list[int], seed: int, streams: int) -> list[tuple[int, int]]:
    """(stream, shard) as dealt, read off the order of an index of the same shards with one sample each."""
    permuted = whole([1] * len(counts), seed, 3, 1, 1)  # one stream, windows of one shard: the order of the shards
    return [(i % streams, int(shard)) for i, shard in enumerate(permuted)]


def test_order_differs_between_epochs_and_seeds_and_mixes_shards() -> None:
    counts = [100] * 40
    a, b, c = whole(counts, 0, 0, 8, 4), whole(counts, 0, 1, 8, 4), whole(counts, 1, 0, 8, 4)
    assert (a == b).mean() < 0.01
    assert (a == c).mean() < 0.01
    assert np.array_equal(a, whole(counts, 0, 0, 8, 4))
    in_batch = len(np.unique(a[:256] // 100))
    assert in_batch >= 30  # a batch of 256 out of 8 streams with windows of 4: nearly all of 32 shards


def test_order_is_pinned() -> None:
    """A changed order would change every run's batches and break resuming: change this only with a reason."""
    assert whole([3, 1, 4], 0, 0, 2, 1).tolist() == [1, 4, 0, 7, 2, 6, 3, 5]


def test_positions_are_uniform() -> None:
    """Over epochs, a sample lands in each quarter of the epoch equally often."""
    counts = [5, 7, 4, 8] * 4  # 96 samples
    quarters = np.zeros((96, 4), int)
    for epoch in range(400):
        quarters[whole(counts, 7, epoch, 4, 2), np.arange(96) * 4 // 96] += 1
    assert abs(quarters / 400 - 0.25).max() < 0.12  # 5 standard deviations of a binomial: 0.108


@settings(deadline=None, max_examples=60)
@given(
    sizes.filter(lambda counts: sum(counts) >= 24),
    constants,
    st.integers(1, 8),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_global_batches_are_the_same_for_any_ranks(
    counts: list[int], const: tuple[int, int], world: int, accumulation: int, micro: int
) -> None:
    """Batches that do not divide the data included: what is left of an epoch is dropped, and is less than a batch."""
    batch = accumulation * world * micro
    if batch > sum(counts):
        return
    index, per_epoch = index_of(counts), sum(counts) // batch
    steps = 2 * per_epoch + 1
    order = [plain_order(index.first, 5, epoch, *const) for epoch in range(3)]
    ranks = [MicroBatches(index, 5, *const, (accumulation, world, micro), rank, steps) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {steps * accumulation}
    seen: list[list[int]] = [[], [], []]
    for step, i in product(range(steps), range(accumulation)):
        flat = [pick for batches in ranks for pick in batches[step * accumulation + i]]
        epoch, position = divmod(step, per_epoch)
        begin = position * batch + i * batch // accumulation
        places = range(begin, begin + batch // accumulation)
        assert flat == [(epoch, order[epoch][place], place) for place in places]
        seen[epoch] += [pick.row for pick in flat]
    for rows in seen[:2]:
        assert len(set(rows)) == len(rows) == sum(counts) // batch * batch


def test_micro_batches_end_with_the_run() -> None:
    batches = MicroBatches(index_of([5, 8]), 0, 2, 1, (2, 1, 3), 0, 3)
    assert [batches[i] for i in range(6)] == list(batches)  # type: ignore[call-overload]
    for beyond in (6, -1):
        with pytest.raises(IndexError):
            batches[beyond]


@given(sizes, constants, st.integers(0, 99), st.data())
def test_upcoming_shards_are_those_that_are_read(counts, const, seed, data) -> None:
    start = data.draw(st.integers(0, sum(counts) - 1))
    stop = data.draw(st.integers(start + 1, sum(counts)))
    order = EpochOrder(first_of(counts), seed, 0, *const)
    upcoming = list(order.upcoming_shards(start, stop))
    assert len(set(upcoming)) == len(upcoming)
    read = np.searchsorted(first_of(counts), order.rows(np.arange(start, stop)), "right") - 1
    assert set(read.tolist()) <= set(upcoming)
    if const[1] == 1:  # windows of one shard: also just when it is read first
        assert list(dict.fromkeys(read.tolist())) == upcoming


def test_upcoming_shards_are_windows_in_the_order_in_which_they_are_opened() -> None:
    counts = [4, 2, 6, 3, 5, 1, 0, 7]
    order = EpochOrder(first_of(counts), 3, 0, 2, 2)
    upcoming = list(order.upcoming_shards())
    first_read: dict[int, int] = {}
    for position, row in enumerate(whole(counts, 3, 0, 2, 2)):
        first_read.setdefault(int(np.searchsorted(first_of(counts), row, "right") - 1), position)
    pairs = [upcoming[i : i + 2] for i in range(0, len(upcoming), 2)]
    opened = [min(first_read[s] for s in pair if s in first_read) for pair in pairs]
    assert opened == sorted(opened)
    assert set(first_read) <= set(upcoming)


def test_a_runs_upcoming_shards_go_on_into_the_next_epochs() -> None:
    counts = [4, 6, 5, 7, 3]
    batches = MicroBatches(index_of(counts), 1, 2, 1, (2, 2, 2), 1, stop_step=7)  # 3 steps of 8 an epoch, one left over
    per_epoch = [set(EpochOrder(batches.first, 1, e, 2, 1).upcoming_shards(0, 24)) for e in range(3)]
    upcoming = list(batches.upcoming_shards())
    sizes = [len(per_epoch[0]), len(per_epoch[1])]
    assert set(upcoming[: sizes[0]]) == per_epoch[0]
    assert set(upcoming[sizes[0] : sum(sizes)]) == per_epoch[1]
    assert list(batches.upcoming_shards(6))[: sizes[1]] == upcoming[sizes[0] : sum(sizes)]  # from the second epoch on
    assert list(batches.upcoming_shards(14)) == []


def test_the_order_keeps_nothing_for_each_sample() -> None:
    """Ten times the samples in ten times the shards: less than 20 numbers more for each shard."""
    held = []
    for shards in (100, 1000):
        first = first_of([1000] * shards)
        tracemalloc.start()
        order = EpochOrder(first, 0, 0, 16, 4)
        middle = order.rows(np.arange(len(order) // 2, len(order) // 2 + 256))
        held.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(set(middle.tolist())) == 256
    assert held[1] - held[0] < 900 * 20 * 8
