import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.remote.server import Server
from tests.data.remote.test_cache import original, read
from ummim.data import ShardIndex
from ummim.data import cache as cache_module
from ummim.data.cache import ShardCache
from ummim.data.faults import SourceDown
from ummim.data.shards import ShardReader
from ummim.errors import DataError

NAME = "shard-000002.tar"


@pytest.fixture
def index(server: Server, cache: ShardCache) -> ShardIndex:
    opened = ShardIndex.open(server.url, cache)
    server.requests.clear()
    return opened


def failure(cache: ShardCache, index: ShardIndex, number: int = 2) -> DataError:
    with pytest.raises(DataError) as caught:
        read(cache, index, number)
    return caught.value


def make_older(cache: ShardCache, seconds: float) -> None:
    when = time.time() - seconds
    for note in (cache.folder / "failed").iterdir():
        os.utime(note, (when, when))


def test_a_missing_shard_is_asked_for_once_and_others_go_on(
    server: Server, cache: ShardCache, index: ShardIndex
) -> None:
    (server.folder / NAME).rename(server.folder / "hidden")
    reader = ShardReader(index)
    for row in (8, 9, 8):
        with pytest.raises(DataError) as caught:
            reader.read(row)
        assert str(caught.value) == (
            f"{server.url}/{NAME}: HTTP 404 Not Found: put the shard back there, or index again what is left"
        )
        assert not isinstance(caught.value, SourceDown)
    assert server.counts() == {NAME: 1}
    assert len(reader.read(0)) == 1000
    reader.close()


def test_a_missing_shard_is_asked_for_again_after_a_while_and_by_the_next_job(
    server: Server, cache: ShardCache, index: ShardIndex
) -> None:
    (server.folder / NAME).rename(server.folder / "hidden")
    first = str(failure(cache, index))
    make_older(cache, 59)
    assert str(failure(cache, index)) == first
    assert len(server.requests) == 1
    make_older(cache, 61)
    assert str(failure(cache, index)) == first
    assert len(server.requests) == 2
    (server.folder / "hidden").rename(server.folder / NAME)
    assert read(ShardCache(cache.folder, cache.limit), index, 2) == original(server, 2)


def test_a_shard_that_a_working_server_fails_to_send_is_given_up_alone(server: Server, cache: ShardCache) -> None:
    hasty = ShardCache(cache.folder, cache.limit, retry_seconds=0.05)
    index = ShardIndex.open(server.url, hasty)
    server.faults[NAME] = [500, "..."]
    error = failure(hasty, index)
    assert not isinstance(error, SourceDown)
    assert str(error).startswith(
        f"{server.url}/{NAME}: HTTP 500 Internal Server Error (given up after 0.05 s of trying"
    )
    asked = len(server.requests)
    assert str(failure(hasty, index)) == str(error)
    assert len(server.requests) == asked
    make_older(hasty, 61)
    server.faults[NAME] = []
    assert read(hasty, index, 2) == original(server, 2)
    assert not list((cache.folder / "failed").iterdir())


def test_a_dead_server_is_waited_for_once(shards: Path, cache: ShardCache) -> None:
    hasty = ShardCache(cache.folder, cache.limit, retry_seconds=0.5)
    with Server(shards) as server:
        index = ShardIndex.open(server.url, hasty)
    error = failure(hasty, index)
    assert isinstance(error, SourceDown)
    assert "Connection refused (given up after 0.5 s of trying without progress): check the server" in str(error)
    patient = ShardCache(cache.folder, cache.limit, retry_seconds=60, job=hasty.job)
    other = failure(patient, index, 3)  # tried, but not for a minute
    assert isinstance(other, SourceDown)
    assert "(tried once)" in str(other)
    port = int(server.url.rpartition(":")[2])
    with Server(shards, port) as again:
        assert read(hasty, index, 4) == original(again, 4)
        again.faults["shard-000005.tar"] = [500, 500]
        assert read(patient, index, 5) == original(again, 5)  # it has answered since: patience is worth while again


@pytest.mark.usefixtures("short_stalls")
def test_who_waits_for_anothers_download_shares_its_failure(server: Server, cache: ShardCache) -> None:
    hasty = ShardCache(cache.folder, cache.limit, retry_seconds=0.5)
    index = ShardIndex.open(server.url, hasty)
    server.faults[NAME] = ["stall", "..."]
    messages: list[str] = []
    threads = [threading.Thread(target=lambda: messages.append(str(failure(hasty, index)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(messages)) == 1
    assert server.counts()[NAME] <= 5  # of one of them, not of eight


def test_a_damaged_shard_is_never_given_out(server: Server, cache: ShardCache, index: ShardIndex) -> None:
    server.faults[NAME] = ["corrupt", "..."]
    assert "its checksum is" in str(failure(cache, index))
    assert not list((cache.folder / "shards").iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 80 kB, which holds four shards of five pages each."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_on_a_full_disk_shards_make_room(server: Server, index: ShardIndex, small_disk: Path) -> None:
    cache = ShardCache(small_disk, 10**6, retry_seconds=60)
    for number in range(6):
        assert read(cache, index, number) == original(server, number)
    assert 3 <= len(list((small_disk / "shards").glob("*.tar"))) <= 4


def test_a_disk_full_of_other_things_is_one_message(server: Server, index: ShardIndex, small_disk: Path) -> None:
    (small_disk / "other").write_bytes(b"x" * 68_000)
    error = failure(ShardCache(small_disk, 10**6, retry_seconds=60), index)
    assert str(error) == (
        f"disk full while writing below {small_disk}, and no shard is left there to evict: free some space, or set "
        "data.cache to a folder on a larger disk"
    )
    (small_disk / "other").unlink()
    assert read(ShardCache(small_disk, 10**6), index, 2) == original(server, 2)


def test_another_users_folder_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = cache_module.default_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    elsewhere = tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    with pytest.raises(DataError, match="is another user's: set data.cache"):
        cache_module.default_folder()
