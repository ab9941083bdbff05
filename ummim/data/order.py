"""The order of samples: a pure function of (seed, epoch, index), the same for any ranks and workers.

Shards are permuted per epoch and dealt to canonical streams; within a stream, samples are permuted in windows
of a few shards; the epoch's sequence takes one sample from each stream in turn, leaving out streams that have
run dry. Global batches are consecutive stretches of it. Every sample comes exactly once an epoch, save those
of the last, incomplete global batch, which is dropped (others in each epoch).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ummim.data.shards import ShardIndex
from ummim.masking import sample_seed


def epoch_order(index: ShardIndex, seed: int, epoch: int, streams: int, window: int) -> np.ndarray:
    """(samples,) int64: the rows of the table in the order of ``epoch``."""
    first = index.first
    shards = np.argsort(_hash(sample_seed(seed, epoch, "order of shards"), np.arange(len(index.shards))), kind="stable")
    ticket = _hash(sample_seed(seed, epoch, "order of samples"), np.arange(len(index)))  # (samples,)

    dealt = [shards[s::streams] for s in range(min(streams, len(shards)))]
    sizes = np.array([int((first[own + 1] - first[own]).sum()) for own in dealt])
    lanes = np.full((int(sizes.max(initial=0)), len(dealt)), -1, np.int64)  # a column per stream, -1 when dry
    for s, own in enumerate(dealt):
        rows = [_shuffled(first, own[w : w + window], ticket) for w in range(0, len(own), window)]
        lanes[: sizes[s], s] = np.concatenate(rows)
    turns = lanes.ravel()
    return turns[turns >= 0]


def _shuffled(first: np.ndarray, shards: np.ndarray, ticket: np.ndarray) -> np.ndarray:
    rows = np.concatenate([np.arange(first[s], first[s + 1]) for s in shards])
    return rows[np.argsort(ticket[rows], kind="stable")]


def _hash(seed: int, values: np.ndarray) -> np.ndarray:
    """SplitMix64 of a counter: unlike ``numpy.random``, the same in every version."""
    z = np.uint64(seed) + (values.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Pick(NamedTuple):
    """A sample to read."""

    epoch: int
    row: int  # of the index's table
    position: int  # in the epoch's order


class MicroBatches:
    """Which samples a rank reads, micro-batch by micro-batch: a batch sampler of (epoch, row, position) picks.

    A global batch is a stretch of the epoch's order, laid out as (accumulation, world_size, micro_batch):
    rank r takes ``[i, r]`` as its i-th micro-batch of the step. Starting at a step costs no replay.

    Args:
        index: the opened shards.
        seed, streams, window: of the order, see ``epoch_order``.
        layout: (accumulation, world_size, micro_batch); the global batch is their product.
        rank: this process, 0 <= rank < world_size.
        start_step, stop_step: optimizer steps done before, and after, the iteration.
    """

    def __init__(
        self,
        index: ShardIndex,
        seed: int,
        streams: int,
        window: int,
        layout: tuple[int, int, int],
        rank: int,
        start_step: int,
        stop_step: int,
    ) -> None:
        self.index, self.seed, self.streams, self.window = index, seed, streams, window
        self.layout, self.rank = layout, rank
        self.start_step, self.stop_step = start_step, stop_step
        self.steps_per_epoch = len(index) // int(np.prod(layout))

    def __len__(self) -> int:
        return max(self.stop_step - self.start_step, 0) * self.layout[0]

    def __iter__(self) -> Iterator[list[Pick]]:
        global_batch = int(np.prod(self.layout))
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(self.start_step, self.stop_step):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(self.index, self.seed, epoch, self.streams, self.window)
            start = step % self.steps_per_epoch * global_batch
            places = np.arange(start, start + global_batch).reshape(self.layout)  # (accumulation, world, micro)
            for mine in places[:, self.rank]:
                yield [Pick(epoch, int(order[place]), int(place)) for place in mine]
