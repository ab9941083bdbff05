import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.data.remote.conftest import write_shards
from tests.data.remote.server import Server
from ummim.data import ShardIndex
from ummim.data import shards as shards_module
from ummim.data.cache import ShardCache, parse_size
from ummim.data.shards import ShardReader
from ummim.errors import DataError


def read(cache: ShardCache, index: ShardIndex, number: int) -> bytes:
    """A shard's content, through the cache."""
    shard = index.shards[number]
    descriptor = cache.open(index.location(number), shard.sha256, shard.bytes)
    try:
        return os.pread(descriptor, shard.bytes + 1, 0)
    finally:
        os.close(descriptor)


def original(server: Server, number: int) -> bytes:
    return (server.folder / f"shard-{number:06d}.tar").read_bytes()


def stored(cache: ShardCache) -> int:
    """Bytes in the folder of shards."""
    total = 0
    for path in (cache.folder / "shards").glob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.fixture
def index(server: Server, cache: ShardCache) -> ShardIndex:
    opened = ShardIndex.open(server.url, cache)
    server.requests.clear()
    return opened


def test_a_shard_is_fetched_once_and_found_by_the_next_process(
    server: Server, cache: ShardCache, index: ShardIndex
) -> None:
    for _ in range(3):
        assert read(cache, index, 2) == original(server, 2)
    later = ShardCache(cache.folder, cache.limit)
    assert read(later, index, 2) == original(server, 2)
    assert server.counts() == {"shard-000002.tar": 1}
    assert [path.suffix for path in (cache.folder / "shards").iterdir()] == [".tar"]  # no lock or part is left


def test_a_copy_of_the_wrong_size_is_fetched_again(server: Server, cache: ShardCache, index: ShardIndex) -> None:
    read(cache, index, 2)
    os.truncate(cache.path(index.shards[2].sha256), 100)
    assert read(cache, index, 2) == original(server, 2)


@pytest.fixture
def start(server: Server, cache: ShardCache) -> Iterator[Callable[[], BaseProcess]]:
    """Start a process that reads all shards with six threads."""
    processes: list[BaseProcess] = []

    def read_all() -> None:
        index = ShardIndex.open(server.url, cache)
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(partial(read, cache, index), [*range(6), *range(5, -1, -1)]))

    def make() -> BaseProcess:
        processes.append(multiprocessing.get_context("fork").Process(target=read_all))
        processes[-1].start()
        return processes[-1]

    yield make
    for process in processes:
        process.kill()
        process.join()


def test_processes_and_threads_fetch_each_shard_once(
    server: Server, cache: ShardCache, start: Callable[[], BaseProcess]
) -> None:
    server.pace = 0.005
    processes = [start(), start()]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert {server.counts()[f"shard-{n:06d}.tar"] for n in range(6)} == {1}
    assert server.counts()["index.npy"] == 1
    for shard in ShardIndex.open(server.folder).shards:
        assert cache.path(shard.sha256).read_bytes() == (server.folder / shard.name).read_bytes()


def test_a_kill_in_the_middle_is_made_good(server: Server, cache: ShardCache, start: Callable[[], BaseProcess]) -> None:
    server.pace = 0.05
    process = start()
    deadline = time.monotonic() + 30
    while not (parts := [p for p in (cache.folder / "shards").glob("*.part") if p.stat().st_size > 2000]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    server.pace = 0.0
    index = ShardIndex.open(server.url, cache)
    server.requests.clear()
    assert [read(cache, index, number) for number in range(6)] == [original(server, number) for number in range(6)]
    assert len([wanted for _, wanted in server.requests if wanted]) >= len(parts)  # resumed, not begun anew
    assert {path.suffix for path in (cache.folder / "shards").iterdir()} == {".tar"}


def test_the_least_recently_used_are_evicted(server: Server, cache: ShardCache, index: ShardIndex) -> None:
    small = ShardCache(cache.folder, 65_000)
    for number, age in ((0, 40), (1, 30), (2, 20)):
        read(small, index, number)
        when = time.time() - age
        os.utime(small.path(index.shards[number].sha256), (when, when))
    read(small, index, 0)
    read(small, index, 3)
    here = [number for number in range(6) if small.path(index.shards[number].sha256).exists()]
    assert here == [0, 2, 3]


def test_an_evicted_shard_stays_readable_to_who_has_it_open(
    server: Server, cache: ShardCache, index: ShardIndex
) -> None:
    small = ShardCache(cache.folder, 25_000)
    shard = index.shards[0]
    descriptor = small.open(index.location(0), shard.sha256, shard.bytes)
    read(small, index, 1)
    assert not small.path(shard.sha256).exists()
    assert os.pread(descriptor, shard.bytes, 0) == original(server, 0)
    os.close(descriptor)


def test_a_reader_gives_back_the_space_of_evicted_shards(
    server: Server, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evicted_but_open() -> int:
        links = (os.path.realpath(path) for path in Path("/proc/self/fd").iterdir())
        return sum(link.startswith(str(cache.folder)) and link.endswith("(deleted)") for link in links)

    small = ShardCache(cache.folder, 25_000)
    reader = ShardReader(ShardIndex.open(server.url, small))
    for row in range(24):
        assert len(reader.read(row)) == 1000 + row % 4
    assert evicted_but_open() == 5  # they may be read again soon
    monkeypatch.setattr(shards_module, "_IDLE_SECONDS", -1.0)
    reader.read(0)
    assert evicted_but_open() == 5
    reader.close()
    for row in range(24):
        reader.read(row)
    assert evicted_but_open() == 1
    reader.close()


def test_a_data_set_larger_than_the_cache_is_read_within_the_limit(
    server: Server, cache: ShardCache, index: ShardIndex
) -> None:
    small = ShardCache(cache.folder, 65_000, retry_seconds=60)
    server.pace = 0.001
    most, finished = [0], threading.Event()

    def watch() -> None:
        while not finished.is_set():
            most[0] = max(most[0], stored(small))

    watcher = threading.Thread(target=watch)
    watcher.start()
    numbers = [number for _ in range(4) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:  # more at a time than fit
        contents = list(pool.map(lambda number: read(small, index, number), numbers))
    finished.set()
    watcher.join()
    assert contents == [original(server, number) for number in numbers]
    assert 40_000 < most[0] <= 65_000


def test_a_stale_part_makes_room(server: Server, cache: ShardCache, index: ShardIndex) -> None:
    small = ShardCache(cache.folder, 45_000)
    (small.folder / "shards").mkdir()
    stale = small.folder / "shards" / f"{'a' * 64}-40000.part"
    stale.write_bytes(b"x")
    read(small, index, 0)
    assert not stale.exists()


def test_a_shard_larger_than_the_cache_is_one_message(server: Server, cache: ShardCache, index: ShardIndex) -> None:
    with pytest.raises(DataError, match="data.cache_size is 19999 bytes, but one shard takes 20000: raise it"):
        read(ShardCache(cache.folder, 19_999), index, 0)


def test_a_folder_that_cannot_be_written_is_one_message(server: Server, index: ShardIndex, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file.*: set data.cache to a folder on this machine's disk that you can write"):
        read(ShardCache(tmp_path / "file" / "cache", 10**6), index, 0)


def test_a_slow_file_system_is_read_through_the_cache(shards: Path, cache: ShardCache, server: Server) -> None:
    index = ShardIndex.open(shards, cache)
    assert index.folder == shards
    assert read(cache, index, 1) == original(server, 1)
    (shards / "shard-000001.tar").unlink()
    assert len(read(cache, index, 1)) == 20_000
    (shards / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=f"{shards}/shard-000002.tar: No such file or directory: put the shard back"):
        read(cache, index, 2)


def test_shards_of_the_same_name_in_two_data_sets_are_kept_apart(
    server: Server, cache: ShardCache, index: ShardIndex, tmp_path: Path
) -> None:
    with Server(write_shards(tmp_path / "other", seed=1)) as other:
        second = ShardIndex.open(other.url, cache)
        assert read(cache, index, 0) != read(cache, second, 0)
    assert read(cache, index, 0) == original(server, 0)


def test_a_checksum_that_is_none_names_no_file(cache: ShardCache) -> None:
    with pytest.raises(DataError, match="is no SHA-256"):
        cache.path("../../etc/passwd")


@pytest.mark.parametrize(
    ("text", "size"),
    [("100GB", 100 * 10**9), ("1.5 TB", 15 * 10**11), ("512MiB", 2**29), ("64kb", 64_000), ("1000", 1000)],
)
def test_sizes_are_read_as_they_are_written(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "10 XB", "-1GB", "1e3", "GB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)
