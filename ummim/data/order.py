"""The order of samples: a pure function of (seed, epoch, index), the same for any ranks and workers.

Shards are permuted per epoch and dealt to canonical streams; within a stream, samples are permuted in windows
of a few shards; the epoch's sequence takes one sample from each stream in turn, leaving out streams that have
run dry. Global batches are consecutive stretches of it. Every sample comes exactly once an epoch, save those
of the last, incomplete global batch, which is dropped (others in each epoch).

Nothing is kept for each sample of the data: a position in the epoch leads to its stream and its place therein by
arithmetic, the place to a window of shards, and only windows in use are permuted.
"""

import heapq
from collections.abc import Iterator
from math import ceil
from typing import NamedTuple

import numpy as np

from ummim.data.shards import ShardIndex
from ummim.seeds import sample_seed


class EpochOrder:
    """The order of one epoch, worked out where it is asked for.

    Holds a few numbers for each shard, and the rows of the window that each stream was last read in.

    Args:
        first: (shards + 1,) int64, the row of each shard's first sample and the sample count, as in ``ShardIndex``.
        seed: the run's.
        epoch: from 0.
        streams: shards are dealt to this many streams.
        window: within a stream, samples are permuted among this many consecutive shards.
    """

    def __init__(self, first: np.ndarray, seed: int, epoch: int, streams: int, window: int) -> None:
        self.first, self.window = first, window
        shards = np.arange(len(first) - 1)
        permuted = shards[np.argsort(_hash(sample_seed(seed, epoch, "order of shards"), shards), kind="stable")]
        self.tickets = sample_seed(seed, epoch, "order of samples")
        self.dealt = [permuted[s::streams] for s in range(min(streams, len(shards)))]
        self.starts = [self._window_starts(own) for own in self.dealt]  # places; the last entry is the stream's size
        self.sizes = np.array([starts[-1] for starts in self.starts])  # (streams,)

        # Turns fall into sections, between which a stream runs dry: section k has all but the k smallest streams.
        self.by_size = np.argsort(self.sizes, kind="stable")
        self.section_turn = np.array([0, *self.sizes[self.by_size]])  # the first turn of each section
        lengths = np.diff(self.section_turn) * np.arange(len(self.sizes), 0, -1)  # samples in each
        self.section_start = np.array([0, *lengths.cumsum()])  # the first position of each
        self._windows: dict[int, tuple[int, np.ndarray]] = {}  # stream -> (window, its rows as permuted)

    def __len__(self) -> int:
        return int(self.first[-1])

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """(n,) positions, 0 <= position < len(self), ascending or not -> (n,) int64 rows of the table."""
        streams, places = self._locate(positions)
        rows = np.empty(len(positions), np.int64)
        for s in np.unique(streams).tolist():
            mine = streams == s
            rows[mine] = self._stream_rows(s, places[mine])
        return rows

    def upcoming_shards(self, start: int = 0, stop: int | None = None) -> Iterator[int]:
        """The shards that positions from ``start`` up to ``stop`` (the epoch's end) may read, in order of first use.

        A window counts as one: its shards come together, as its first sample may lie in any of them. Safe in a thread.
        """
        stop = len(self) if stop is None else stop
        if start < stop:
            ((stream,), (turn,)) = self._locate(np.array([start]))
            places = [min(size, turn + (s < stream)) for s, size in enumerate(self.sizes.tolist())]  # where each stands
            for _, s, w in heapq.merge(*(self._stream_windows(s, place, stop) for s, place in enumerate(places))):
                yield from self._window_shards(s, w).tolist()

    def _stream_windows(self, stream: int, place: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(position of its first sample from ``place`` on, stream, window) of the windows of a stream."""
        starts = self.starts[stream]
        for w in range(int(np.searchsorted(starts, place, "right")) - 1, len(starts) - 1):
            if starts[w] < starts[w + 1]:  # else no sample is in it
                position = int(self._position(stream, np.maximum(starts[w : w + 1], place))[0])
                if position >= stop:
                    return
                yield position, stream, w

    def _window_starts(self, own: np.ndarray) -> np.ndarray:
        """(windows + 1,): the place at which each window of a stream of these shards begins, and the stream's size."""
        ends = np.cumsum([0, *(self.first[own + 1] - self.first[own])], dtype=np.int64)
        return np.append(ends[: -1 : self.window], ends[-1])

    def _locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) positions -> (n,) streams, and (n,) places in them."""
        section = np.searchsorted(self.section_start, positions, "right") - 1
        left = len(self.sizes) - section  # streams that take part
        turn, nth = np.divmod(positions - self.section_start[section], left)
        streams = np.empty(len(positions), np.int64)
        for k in np.unique(section).tolist():
            here = section == k
            streams[here] = np.sort(self.by_size[k:])[nth[here]]
        return streams, self.section_turn[section] + turn

    def _position(self, stream: int, places: np.ndarray) -> np.ndarray:
        """(n,) places in ``stream``, each below its size -> (n,) positions in the epoch: undoes ``_locate``."""
        section = np.searchsorted(self.section_turn, places, "right") - 1
        turns = (places - self.section_turn[section]) * (len(self.sizes) - section)
        before = (self.sizes[:stream, None] > places).sum(0)  # streams that come earlier in the same turn
        return self.section_start[section] + turns + before

    def _stream_rows(self, stream: int, places: np.ndarray) -> np.ndarray:
        windows = np.searchsorted(self.starts[stream], places, "right") - 1
        rows = np.empty(len(places), np.int64)
        for w in np.unique(windows).tolist():
            here = windows == w
            rows[here] = self._window_rows(stream, w)[places[here] - self.starts[stream][w]]
        return rows

    def _window_rows(self, stream: int, window: int) -> np.ndarray:
        """The rows of a window as permuted; the stream's last one is remembered."""
        if self._windows.get(stream, (-1,))[0] != window:
            shards = self._window_shards(stream, window)
            rows = np.concatenate([np.arange(self.first[s], self.first[s + 1]) for s in shards])
            self._windows[stream] = window, rows[np.argsort(_hash(self.tickets, rows), kind="stable")]
        return self._windows[stream][1]

    def _window_shards(self, stream: int, window: int) -> np.ndarray:
        return self.dealt[stream][window * self.window : (window + 1) * self.window]


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
    """Which samples a rank reads: its micro-batches from the run's first step on, by number.

    A global batch is a stretch of the epoch's order, laid out as (accumulation, world_size, micro_batch):
    rank r takes ``[i, r]`` as its i-th micro-batch of the step. Any number may be asked for; none is replayed.

    Args:
        index: the opened shards.
        seed, streams, window: of the order, see ``EpochOrder``.
        layout: (accumulation, world_size, micro_batch); the global batch is their product.
        rank: this process, 0 <= rank < world_size.
        stop_step: optimizer steps of the run.
    """

    def __init__(
        self,
        index: ShardIndex,
        seed: int,
        streams: int,
        window: int,
        layout: tuple[int, int, int],
        rank: int,
        stop_step: int,
    ) -> None:
        self.first, self.seed, self.streams, self.window = index.first, seed, streams, window
        self.layout, self.rank, self.stop_step = layout, rank, stop_step
        self.global_batch = int(np.prod(layout))
        self.steps_per_epoch = len(index) // self.global_batch
        self._order = 0, self._order_of(0)  # the epoch that was read last

    def __len__(self) -> int:
        return self.stop_step * self.layout[0]

    def __getitem__(self, number: int) -> list[Pick]:
        """Micro-batch ``number`` of this rank: the ``number % accumulation``-th of its optimizer step."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        step, i = divmod(number, self.layout[0])
        epoch, step = divmod(step, self.steps_per_epoch)
        self._order = epoch, self._epoch(epoch)
        _, world, micro = self.layout
        start = step * self.global_batch + (i * world + self.rank) * micro
        places = np.arange(start, start + micro)
        rows = self._order[1].rows(places)
        return [Pick(epoch, row, place) for row, place in zip(rows.tolist(), places.tolist(), strict=True)]

    def upcoming_shards(self, number: int = 0) -> Iterator[int]:
        """Numbers of the shards that all ranks read from micro-batch ``number`` on, in order of first use.

        A shard comes once an epoch. Safe in a thread.
        """
        step = number // self.layout[0]
        while step < self.stop_step:
            epoch, done = divmod(step, self.steps_per_epoch)
            ahead = min(self.steps_per_epoch - done, self.stop_step - step)
            start = done * self.global_batch
            yield from self._epoch(epoch).upcoming_shards(start, start + ahead * self.global_batch)
            step += ahead

    def _epoch(self, epoch: int) -> EpochOrder:
        known, order = self._order
        return order if known == epoch else self._order_of(epoch)

    def _order_of(self, epoch: int) -> EpochOrder:
        return EpochOrder(self.first, self.seed, epoch, self.streams, self.window)


class RowBatches:
    """The rows of a table, batch by batch and rank after rank; the last row again until all ranks have as many.

    Args:
        first: (shards + 1,) the row of each shard's first sample, and the sample count, as in ``ShardIndex``.
        batch: rows of a rank's batch.
        rank, world_size: this process among all.
    """

    def __init__(self, first: np.ndarray, batch: int, rank: int, world_size: int) -> None:
        self.first, self.rows = first, int(first[-1])
        self.batch, self.rank, self.world_size = batch, rank, world_size

    def __len__(self) -> int:
        return ceil(self.rows / (self.batch * self.world_size))

    def __getitem__(self, number: int) -> list[Pick]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        first = (number * self.world_size + self.rank) * self.batch
        return [Pick(0, min(row, self.rows - 1), 0) for row in range(first, first + self.batch)]

    def upcoming_shards(self, number: int = 0) -> Iterator[int]:
        """Numbers of the shards that all ranks read from batch ``number`` on, in order. Safe in a thread."""
        row = min(number * self.world_size * self.batch, self.rows)
        start = int(np.searchsorted(self.first, row, "right")) - 1
        yield from (shard for shard in range(start, len(self.first) - 1) if self.first[shard] < self.first[shard + 1])
