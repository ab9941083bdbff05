import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.data.remote.server import Server
from ummim.data import ShardIndex
from ummim.data import prefetch as module
from ummim.data.cache import ShardCache
from ummim.data.locks import locked
from ummim.data.prefetch import Prefetcher


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.05)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def here(index: ShardIndex) -> list[int]:
    assert index.cache is not None
    return [number for number, shard in enumerate(index.shards) if index.cache.path(shard.sha256).exists()]


def in_order(position: int) -> Iterator[int]:
    yield from range(position, 6)


@contextmanager
def prefetching(server: Server, cache: ShardCache, ahead: int) -> Iterator[Prefetcher]:
    with Prefetcher(ShardIndex.open(server.url, cache), in_order, ahead) as prefetcher:
        yield prefetcher


def test_upcoming_shards_are_fetched_as_reading_goes_on(server: Server, cache: ShardCache) -> None:
    with prefetching(server, cache, 2) as prefetcher:
        wait_until(lambda: here(prefetcher.index) == [0, 1])
        time.sleep(0.1)
        assert here(prefetcher.index) == [0, 1]
        prefetcher.position = 2
        wait_until(lambda: here(prefetcher.index) == [0, 1, 2, 3])
    assert max(server.counts().values()) == 1


def test_a_shard_needed_sooner_is_never_evicted_for_a_later_one(server: Server, cache: ShardCache) -> None:
    small = ShardCache(cache.folder, 65_000)
    with prefetching(server, small, 6) as prefetcher:
        wait_until(lambda: here(prefetcher.index) == [0, 1, 2])
        time.sleep(0.1)
        assert here(prefetcher.index) == [0, 1, 2]
        prefetcher.position = 2
        wait_until(lambda: here(prefetcher.index) == [2, 3, 4])
    assert max(server.counts().values()) == 1


def test_prefetching_evicts_nothing_that_it_is_told_to_keep(server: Server, cache: ShardCache) -> None:
    small = ShardCache(cache.folder, 45_000)
    index = ShardIndex.open(server.url, small)
    paths = [small.path(shard.sha256) for shard in index.shards]

    def prefetch(number: int, keep: list[Path]) -> bool:
        shard = index.shards[number]
        return small.prefetch(index.location(number), shard.sha256, shard.bytes, keep, lambda: False)

    assert prefetch(0, [])
    os.utime(paths[0], (0, 0))
    assert prefetch(1, [])
    assert prefetch(2, [paths[0]])
    assert here(index) == [0, 2]
    assert not prefetch(3, [paths[0], paths[2]])
    assert here(index) == [0, 2]


def test_what_is_wanted_counts_as_used(server: Server, cache: ShardCache) -> None:
    with prefetching(server, cache, 2) as prefetcher:
        wait_until(lambda: here(prefetcher.index) == [0, 1])
        path = cache.path(prefetcher.index.shards[0].sha256)
        os.utime(path, (0, 0))
        wait_until(lambda: path.stat().st_mtime > 0)


def test_a_reader_that_runs_ahead_evicts_what_is_behind_it(server: Server, cache: ShardCache) -> None:
    small = ShardCache(cache.folder, 65_000)
    with prefetching(server, small, 2) as prefetcher:
        wait_until(lambda: here(prefetcher.index) == [0, 1])
        prefetcher.position = 1
        wait_until(lambda: here(prefetcher.index) == [0, 1, 2])
        shard = prefetcher.index.shards[5]
        time.sleep(0.05)
        small.open(prefetcher.index.location(5), shard.sha256, shard.bytes)
        wait_until(lambda: here(prefetcher.index) == [1, 2, 5])


def test_a_cache_too_small_for_what_is_read_at_a_time_is_told(
    server: Server, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    with prefetching(server, ShardCache(cache.folder, 65_000), 6):
        assert not caplog.messages
    with prefetching(server, ShardCache(cache.folder, 45_000), 6):
        assert caplog.messages == [
            "data.cache_size is 4.5e-05 GB, but the 3 shards that are read at a time take 6e-05 GB: they will be "
            "fetched again and again; raise it, or lower data.streams or data.window"
        ]


def test_two_ranks_share_the_work(server: Server, cache: ShardCache) -> None:
    server.pace = 0.002
    with prefetching(server, cache, 6) as one, prefetching(server, cache, 6) as other:
        assert one is not other
        wait_until(lambda: here(one.index) == list(range(6)))
    assert {server.counts()[f"shard-{n:06d}.tar"] for n in range(6)} == {1}


def test_a_shard_that_another_process_fetches_is_left_to_it(server: Server, cache: ShardCache) -> None:
    index = ShardIndex.open(server.url, cache)
    with locked(cache.path(index.shards[0].sha256).with_suffix(".lock")), prefetching(server, cache, 3):
        wait_until(lambda: here(index) == [1, 2])
    assert "shard-000000.tar" not in server.counts()


def test_a_failing_shard_does_not_hold_up_the_others(server: Server, cache: ShardCache) -> None:
    server.faults["shard-000000.tar"] = ["drop", 500, "corrupt"]
    (server.folder / "shard-000001.tar").unlink()
    with prefetching(server, cache, 6) as prefetcher:
        wait_until(lambda: here(prefetcher.index) == [0, 2, 3, 4, 5])
    assert server.counts()["shard-000001.tar"] == 1  # it is known to be missing


def test_a_prefetcher_stops_in_the_middle_of_a_shard(server: Server, cache: ShardCache) -> None:
    server.pace = 0.05  # a second for each shard
    with prefetching(server, cache, 6):
        wait_until(lambda: server.counts()["shard-000000.tar"] == 1)
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "prefetch"])
    assert not list((cache.folder / "shards").glob("*.tar"))
    assert not list((cache.folder / "shards").glob("*.lock"))


def test_without_a_cache_nothing_is_done(shards: Path) -> None:
    index = ShardIndex.open(shards)
    before = threading.active_count()
    with Prefetcher(index, in_order, 6) as prefetcher:
        assert threading.active_count() == before
        assert prefetcher.wanted() == []


def test_a_slow_file_system_is_prefetched_too(shards: Path, cache: ShardCache) -> None:
    index = ShardIndex.open(shards, cache)
    with Prefetcher(index, in_order, 6):
        wait_until(lambda: here(index) == list(range(6)))
