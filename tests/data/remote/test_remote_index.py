import hashlib
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest

from tests.data.remote.conftest import write_shards
from tests.data.remote.server import Server
from ummim.data import DataConfig, ShardIndex
from ummim.data.cache import ShardCache
from ummim.data.faults import SourceDown
from ummim.data.shards import ShardReader
from ummim.errors import DataError, RecipeError


def refused(url: str, cache: ShardCache) -> str:
    with pytest.raises(DataError) as caught:
        ShardIndex.open(url, cache)
    return str(caught.value)


def rewrite(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**content, **changes}))


def test_a_remote_folder_is_read_like_a_local_one(server: Server, cache: ShardCache, shards: Path) -> None:
    local, remote = ShardIndex.open(shards), ShardIndex.open(server.url, cache)
    assert (remote.digest, remote.shards, remote.classes) == (local.digest, local.shards, local.classes)
    assert np.array_equal(remote.table, local.table)
    assert isinstance(remote.table, np.memmap)
    assert remote.place == server.url
    remote.check()
    here, there = ShardReader(local), ShardReader(remote)
    for row in range(24):
        assert here.read(row) == there.read(row)
        assert there.where(row) == here.where(row).replace(str(shards), server.url)
    here.close()
    there.close()


def test_an_index_is_passed_on_without_asking_the_server(server: Server, cache: ShardCache) -> None:
    index = ShardIndex.open(server.url, cache)
    data = pickle.dumps(index)
    assert len(data) < 1000
    server.requests.clear()
    copy = pickle.loads(data)  # noqa: S301  (our own bytes)
    assert (copy.digest, copy.cache, copy.url) == (index.digest, cache, server.url)
    assert not server.requests


def test_many_processes_fetch_the_table_once(server: Server, cache: ShardCache) -> None:
    server.pace = 0.01

    def open_it() -> None:
        assert len(ShardIndex.open(server.url, cache)) == 24

    processes = [multiprocessing.get_context("fork").Process(target=open_it) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert server.counts()["index.npy"] == 1
    names = {path.name for path in (cache.folder / "indices").rglob("*") if path.is_file()}
    assert names == {"index.json", "index.npy", "classes.txt"}


def test_an_index_made_anew_is_noticed_at_opening(server: Server, cache: ShardCache) -> None:
    old = ShardIndex.open(server.url, cache)
    passed_on = pickle.dumps(old)
    write_shards(server.folder, samples=3, seed=1)
    new = ShardIndex.open(server.url, cache)
    assert (len(old), len(new)) == (24, 18)
    assert old.key(23) == "cat/5-3"  # who has it open keeps it
    assert len(list((cache.folder / "indices").iterdir())) == 1
    with pytest.raises(DataError, match=f"{server.url} has been built or indexed anew since this run began"):
        pickle.loads(passed_on)  # noqa: S301


def test_classes_named_anew_are_noticed(server: Server, cache: ShardCache) -> None:
    assert ShardIndex.open(server.url, cache).classes == ["cat"]
    (server.folder / "classes.txt").write_text("Katze\n")
    assert ShardIndex.open(server.url, cache).classes == ["Katze"]
    rewrite(server.folder, classes_sha256="0" * 64)
    assert "classes.txt is not the one that was indexed" in refused(server.url, cache)
    (server.folder / "classes.txt").unlink()
    assert f"{server.url}/classes.txt is missing, but the samples are labelled" in refused(
        server.url, ShardCache(cache.folder.with_name("empty"), 10**6)
    )


@pytest.mark.usefixtures("short_stalls")
@pytest.mark.parametrize(
    ("name", "fault"),
    [("index.npy", "short"), ("index.npy", "corrupt")]
    + [(name, fault) for name in ("index.npy", "classes.txt", "index.json") for fault in ("drop", 500, "stall")],
)
def test_index_files_survive_a_failing_server(server: Server, cache: ShardCache, name: str, fault: str | int) -> None:
    server.faults[name] = [fault]
    index = ShardIndex.open(server.url, cache)
    assert (len(index), index.classes) == (24, ["cat"])


def test_what_is_wrong_with_a_remote_index_is_one_message(server: Server, cache: ShardCache) -> None:
    good = (server.folder / "index.json").read_text()
    (server.folder / "index.npy").rename(server.folder / "hidden")
    assert f"{server.url}/index.npy: HTTP 404 Not Found: make it again" in refused(server.url, cache)
    (server.folder / "hidden").rename(server.folder / "index.npy")
    rewrite(server.folder, table_sha256="0" * 64)
    assert "index.npy: its checksum is" in refused(server.url, cache)
    (server.folder / "index.json").write_text("<html>login</html>")
    assert f"{server.url}/index.json is no index" in refused(server.url, cache)
    (server.folder / "index.json").write_text(good.replace("shard-000003", "../shard-000003"))
    assert "names the shard '../shard-000003.tar', which leads out of its folder" in refused(server.url, cache)
    (server.folder / "index.json").unlink()
    message = refused(server.url, cache)
    assert message.startswith(f"{server.url}/index.json: HTTP 404 Not Found: data.shards must be the URL of a folder")


def test_check_asks_for_the_first_and_last_shard(server: Server, cache: ShardCache) -> None:
    index = ShardIndex.open(server.url, cache)
    server.requests.clear()
    index.check()
    assert server.requests == [("shard-000000.tar", None), ("shard-000005.tar", None)]
    for server.heads, server.ranges in ((False, True), (False, False)):
        index.check()
    os.truncate(server.folder / "shard-000005.tar", 100)
    url = f"{server.url}/shard-000005.tar"
    with pytest.raises(DataError, match=f"{url} has 100 bytes, its index says 20000: truncated"):
        index.check()
    (server.folder / "shard-000005.tar").unlink()
    with pytest.raises(DataError, match=f"{url}: HTTP 404 Not Found: restore the shard"):
        index.check()


def test_few_samples_of_many_shards_need_no_whole_shard(server: Server, cache: ShardCache) -> None:
    index = ShardIndex.open(server.url, cache)
    reader, whole = ShardReader(index, sparse=True), ShardReader(index)
    server.faults["shard-000003.tar"] = [500]
    sparse = [reader.read(row) for row in (0, 5, 13, 22)]
    assert not (cache.folder / "shards").exists()
    assert sparse == [whole.read(row) for row in (0, 5, 13, 22)]
    server.requests.clear()
    assert reader.read(1) == whole.read(1)
    assert not server.requests  # its shard is here by now
    (server.folder / "shard-000002.tar").rename(server.folder / "hidden")
    with pytest.raises(DataError, match="shard-000002.tar: HTTP 404 Not Found: restore the shard"):
        reader.read(9)
    reader.close()
    whole.close()


def test_any_file_system_that_fsspec_knows_will_do(shards: Path, cache: ShardCache) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/data/set", recursive=True)
    try:
        index = ShardIndex.open("memory://data/set", cache)
        index.check()
        reader, local = ShardReader(index), ShardReader(ShardIndex.open(shards))
        assert [reader.read(row) for row in range(24)] == [local.read(row) for row in range(24)]
        sparse = ShardReader(ShardIndex.open("memory://data/set", ShardCache(cache.folder / "b", 10**6)), sparse=True)
        assert sparse.read(7) == local.read(7)
        reader.close()
        local.close()
        memory.rm("/data/set/index.json")
        assert "memory://data/set/index.json: no such file: data.shards must be" in refused("memory://data/set", cache)
    finally:
        memory.rm("/data", recursive=True)


def test_a_file_url_is_a_local_folder(shards: Path) -> None:
    index = ShardIndex.open(f"file://{shards}")
    assert index.folder == shards
    assert index.cache is None


def test_a_url_that_needs_a_package_says_which(cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    message = refused("s3://bucket/shards", cache)
    assert message == (
        "s3://bucket/shards/index.json: s3:// needs a package that is not installed: pip install 'ummim[s3]'"
    )


def test_s3_is_read_with_s3fs(server: Server, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})
    server.faults["shard-000003.tar"] = ["drop", 503]
    index = ShardIndex.open("s3://bucket/shards", cache)
    index.check()
    reader, local = ShardReader(index), ShardReader(ShardIndex.open(server.folder))
    assert [reader.read(row) for row in range(24)] == [local.read(row) for row in range(24)]
    reader.close()
    local.close()


def test_a_dead_server_ends_the_opening_after_the_stated_time(shards: Path, tmp_path: Path) -> None:
    with Server(shards) as server:
        pass
    with pytest.raises(SourceDown, match=r"index.json: Connection refused \(given up after 0.05 s"):
        ShardIndex.open(server.url, ShardCache(tmp_path / "cache", 10**6, retry_seconds=0.05))


def test_a_run_whose_shards_are_here_starts_without_the_server(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The order is that of the index as last seen; which shards it names, and what is in them, cannot be stale."""
    cache = ShardCache(tmp_path / "cache", 10**6, retry_seconds=0.2)
    with Server(shards) as server:
        index = ShardIndex.open(server.url, cache)
        reader = ShardReader(index)
        seen = [reader.read(row) for row in range(24)]
        reader.close()
    again = ShardIndex.open(server.url, ShardCache(tmp_path / "cache", 10**6, retry_seconds=0.2))
    again.check()
    assert "Connection refused (given up after 0.2 s" in caplog.text
    assert "Going on with the copy of the index that is in the cache" in caplog.text
    assert again.digest == index.digest
    reader = ShardReader(pickle.loads(pickle.dumps(again)), sparse=True)  # noqa: S301  (our own bytes)
    assert [reader.read(row) for row in range(24)] == seen
    reader.close()
    cache.path(again.shards[5].sha256).unlink()
    with pytest.raises(SourceDown):
        again.check()
    with Server(shards, int(server.url.rpartition(":")[2])) as server:  # up again
        write_shards(shards, samples=3, seed=1)
        assert len(ShardIndex.open(server.url, cache)) == 18
        (shards / "index.json").unlink()
        assert "index.json: HTTP 404" in refused(server.url, cache)  # an answer counts, whatever is here


def test_recipe_keys_make_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert DataConfig("shards").shard_cache() is None
    default = DataConfig("http://host/shards").shard_cache()
    assert default is not None
    assert (default.folder, default.limit) == (tmp_path / f"ummim-cache-{os.getuid()}", 100 * 10**9)
    chosen = DataConfig("shards", cache="/scratch", cache_size="2TiB", retry_seconds=5).shard_cache()
    assert chosen is not None
    assert (chosen.folder, chosen.limit, chosen.retry_seconds) == (Path("/scratch"), 2 * 2**40, 5)
    for wrong in ({"cache_size": "big"}, {"retry_seconds": -1}):
        with pytest.raises(RecipeError):
            DataConfig("shards", **wrong).validate()


def test_the_digest_is_the_one_of_the_files(server: Server, cache: ShardCache) -> None:
    index = ShardIndex.open(server.url, cache)
    assert index.digest == hashlib.sha256((index.folder / "index.json").read_bytes()).hexdigest()
