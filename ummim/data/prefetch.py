"""Shards that are read next, brought to the node while the present ones are read."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from types import TracebackType

from ummim.data.download import Stopped
from ummim.data.shards import ShardIndex

log = logging.getLogger(__name__)

_THREADS = 2  # per rank; the ranks of a node leave each other's shards alone, so they add up
_PAUSE_SECONDS = 2.0  # between two looks at what is upcoming
_RETRY_SECONDS = 30.0  # before a shard that did not come, or that another process fetches, is looked at again


class Prefetcher:
    """Fetches upcoming shards into the index's cache, in background threads; without a cache it does nothing.

    ``with Prefetcher(...) as prefetcher:`` and, whenever something was read, ``prefetcher.position = ...``. Start it
    after the worker processes: they should not be forked from under it. The threads end with the block or the process.

    It never evicts a shard that is needed sooner, so it stops where the cache is full of those. What it fails to
    fetch is left to the reader, which waits, tries again and reports.

    Args:
        index: the shards.
        upcoming: the numbers of the shards that are read from a position on, in order of first use; called in the
            threads. ``MicroBatches.upcoming_shards`` in training.
        ahead: how many of them to have here; 2 * streams * window are those in use and the next of each stream.
        position: where reading begins.
    """

    def __init__(
        self, index: ShardIndex, upcoming: Callable[[int], Iterator[int]], ahead: int, position: int = 0
    ) -> None:
        self.index, self.upcoming, self.ahead, self.position = index, upcoming, ahead, position
        self._stop = threading.Event()
        count = _THREADS if index.cache is not None else 0
        self._threads = [threading.Thread(target=self._run, name="prefetch", daemon=True) for _ in range(count)]

    def __enter__(self) -> "Prefetcher":
        self._warn()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(1)  # one that waits for a silent server ends later, or with the process

    def wanted(self) -> list[int]:
        """The shards to have here now, as many as fit into the cache, those needed first in front."""
        numbers: list[int] = []
        left = self.index.cache.limit if self.index.cache is not None else 0
        for number in islice(self.upcoming(self.position), self.ahead):
            left -= self.index.shards[number].bytes if number not in numbers else 0
            if left < 0:
                break
            numbers.append(number)
        return numbers

    def _warn(self) -> None:
        cache = self.index.cache
        if cache is None or os.environ.get("RANK", "0") != "0":
            return
        in_use = set(islice(self.upcoming(self.position), self.ahead // 2))
        size = sum(self.index.shards[number].bytes for number in in_use)
        if size > cache.limit:
            log.warning(
                "data.cache_size is %.3g GB, but the %d shards that are read at a time take %.3g GB: they will be "
                "fetched again and again; raise it, or lower data.streams or data.window",
                cache.limit / 1e9,
                len(in_use),
                size / 1e9,
            )

    def _run(self) -> None:
        later: dict[int, float] = {}  # shard number -> when to look at it again
        with suppress(Stopped):
            while not self._stop.is_set():
                self._round(later)
                self._stop.wait(_PAUSE_SECONDS)

    def _round(self, later: dict[int, float]) -> None:
        """Fetch what is wanted, until the reader has moved on."""
        cache = self.index.cache
        assert cache is not None
        position, began, numbers = self.position, time.monotonic(), self.wanted()
        shards = [self.index.shards[number] for number in numbers]
        keep = frozenset(cache.path(shard.sha256) for shard in shards)
        for shard in reversed(shards):  # what is needed first is evicted last
            cache.touch(shard.sha256)
        for number, shard in zip(numbers, shards, strict=True):
            if self._stop.is_set() or (self.position != position and time.monotonic() - began > _PAUSE_SECONDS):
                return
            if later.get(number, 0.0) > time.monotonic():
                continue
            here = cache.prefetch(self.index.location(number), shard.sha256, shard.bytes, keep, self._stop.is_set)
            if not here:
                later[number] = time.monotonic() + _RETRY_SECONDS
