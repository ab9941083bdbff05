import time
from itertools import product
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ummim.data.order import MicroBatches, epoch_order
from ummim.data.shards import Shard, ShardIndex, table_dtype

sizes = st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any)
constants = st.tuples(st.integers(1, 6), st.integers(1, 4))  # streams, window


def index_of(counts: list[int]) -> ShardIndex:
    shards = tuple(Shard(f"{i}.tar", 0, "", n) for i, n in enumerate(counts))
    first = np.cumsum([0, *counts])
    return ShardIndex(Path(), shards, first, np.zeros(sum(counts), table_dtype(1)), None, "", "", None)


@given(sizes, constants, st.integers(0, 2**40), st.integers(0, 1000))
def test_every_sample_comes_exactly_once(counts: list[int], const: tuple[int, int], seed: int, epoch: int) -> None:
    order = epoch_order(index_of(counts), seed, epoch, *const)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(sum(counts)))


@given(sizes, constants, st.integers(0, 99))
def test_streams_take_turns_and_shuffle_within_windows(counts: list[int], const: tuple[int, int], seed: int) -> None:
    """Undo the turns: each stream must then hold its shards window by window, in an order given by the shards."""
    streams, window = const
    index = index_of(counts)
    order = epoch_order(index, seed, 3, streams, window)
    shard_of = np.repeat(np.arange(len(counts)), counts)[order]
    lanes: list[list[int]] = [[] for _ in range(min(streams, len(counts)))]
    stream_of = {s: lane for lane, s in _dealt(index, seed, streams)}
    expected_turn: list[int] = []
    sums = [sum(counts[s] for s in stream_of if stream_of[s] == lane) for lane in range(len(lanes))]
    for turn in range(max(sums)):
        expected_turn += [lane for lane in range(len(lanes)) if turn < sums[lane]]
    for shard in shard_of:
        lanes[stream_of[int(shard)]].append(int(shard))
    assert [stream_of[int(shard)] for shard in shard_of] == expected_turn
    for lane, found in enumerate(lanes):
        mine = [s for other, s in _dealt(index, seed, streams) if other == lane]
        start = 0
        for w in range(0, len(mine), window):
            count = sum(counts[s] for s in mine[w : w + window])
            assert set(found[start : start + count]) <= set(mine[w : w + window])
            start += count


def _dealt(index: ShardIndex, seed: int, streams: int) -> list[tuple[int, int]]:
    """(stream, shard) as dealt, read off the order of an index of the same shards with one sample each."""
    ones = index_of([1] * len(index.shards))
    permuted = epoch_order(ones, seed, 3, 1, 1)  # one stream, windows of one shard: the order of the shards
    return [(i % streams, int(shard)) for i, shard in enumerate(permuted)]


def test_order_differs_between_epochs_and_seeds_and_mixes_shards() -> None:
    index = index_of([100] * 40)
    a, b, c = epoch_order(index, 0, 0, 8, 4), epoch_order(index, 0, 1, 8, 4), epoch_order(index, 1, 0, 8, 4)
    assert (a == b).mean() < 0.01
    assert (a == c).mean() < 0.01
    assert np.array_equal(a, epoch_order(index, 0, 0, 8, 4))
    in_batch = len(np.unique(a[:256] // 100))
    assert in_batch >= 30  # a batch of 256 out of 8 streams with windows of 4: nearly all of 32 shards


def test_order_is_pinned() -> None:
    """A changed order would change every run's batches and break resuming: change this only with a reason."""
    assert epoch_order(index_of([3, 1, 4]), 0, 0, 2, 1).tolist() == [1, 4, 0, 7, 2, 6, 3, 5]


def test_positions_are_uniform() -> None:
    """Over epochs, a sample lands in each quarter of the epoch equally often."""
    index = index_of([5, 7, 4, 8] * 4)  # 96 samples
    quarters = np.zeros((96, 4), int)
    for epoch in range(400):
        order = epoch_order(index, 7, epoch, 4, 2)
        quarters[order, np.arange(96) * 4 // 96] += 1
    assert abs(quarters / 400 - 0.25).max() < 0.12  # 5 standard deviations of a binomial: 0.108


@settings(deadline=None, max_examples=30)
@given(
    sizes.filter(lambda counts: sum(counts) >= 24),
    constants,
    st.sampled_from([1, 2, 3, 4, 6, 8]),
    st.integers(0, 40),
)
def test_global_batches_are_the_same_for_any_ranks_and_resume(
    counts: list[int], const: tuple[int, int], world: int, start: int
) -> None:
    index = index_of(counts)
    steps = 2 * (sum(counts) // 24) + 1
    start = min(start, steps)
    order = [epoch_order(index, 5, epoch, *const) for epoch in range(3)]
    per_epoch = sum(counts) // 24
    for accumulation in (a for a in (1, 2, 3) if 24 // world % a == 0):
        layout = (accumulation, world, 24 // world // accumulation)
        ranks = [list(MicroBatches(index, 5, *const, layout, rank, start, steps)) for rank in range(world)]
        assert {len(batches) for batches in ranks} == {(steps - start) * accumulation}
        for step, i in product(range(start, steps), range(accumulation)):
            micro = [ranks[rank][(step - start) * accumulation + i] for rank in range(world)]
            flat = [pick for batch in micro for pick in batch]
            epoch, position = divmod(step, per_epoch)
            begin = position * 24 + i * 24 // accumulation
            places = range(begin, begin + 24 // accumulation)
            assert flat == [(epoch, order[epoch][place], place) for place in places]


def test_a_resume_at_imagenet_scale_costs_what_a_start_costs() -> None:
    index = index_of([1000] * 1281 + [167])
    seconds = []
    for start in (0, 1250 * 40 + 600):
        began = time.perf_counter()
        batch = next(iter(MicroBatches(index, 0, 16, 4, (1, 4, 256), 0, start, 10**6)))
        seconds.append(time.perf_counter() - began)
        assert len(batch) == 256
    assert max(seconds) < 3  # 0.2 s on a quiet machine
