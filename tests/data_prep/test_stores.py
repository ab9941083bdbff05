"""All commands against S3, as moto plays it, and Google's storage, as gcp-storage-emulator does.

Neither is among the test requirements: pip install s3fs 'moto[server]' gcsfs gcp-storage-emulator 'setuptools<81'.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from data_prep import locations
from tests.data.pictures import contents
from tests.data_prep.tars import foreign, run
from ummim.data import ShardIndex
from ummim.data.cache import ShardCache
from ummim.data.shards import ShardReader

REASON = "needs packages that are no requirement of the tests: pip install "


@contextmanager
def amazon(patch: pytest.MonkeyPatch) -> Iterator[Any]:
    reason = REASON + "s3fs 'moto[server]'"
    s3fs = pytest.importorskip("s3fs", reason=reason)
    server = pytest.importorskip("moto.server", reason=reason).ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "key")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3fs.S3FileSystem()
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@contextmanager
def google(patch: pytest.MonkeyPatch) -> Iterator[Any]:
    reason = REASON + "gcsfs gcp-storage-emulator 'setuptools<81'"
    gcsfs = pytest.importorskip("gcsfs", reason=reason)
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason=reason)
    server = emulator.create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server._api._httpd.server_address[1]}")
    patch.setenv("GCSFS_DEFAULT_PROJECT", "project")
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield gcsfs.GCSFileSystem()
    gcsfs.GCSFileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(params=["s3", "gs"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, str]]:
    """A file system with an empty bucket, and the bucket's URL."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(locations, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with (amazon if request.param == "s3" else google)(monkeypatch) as files:
        files.mkdir("shelf")
        yield files, f"{request.param}://shelf"
        files.rm("shelf", recursive=True)  # moto's buckets outlive its servers


def test_shards_are_built_checked_shown_and_read(store, tree: Path, shards: Path, tmp_path: Path, capsys) -> None:
    files, bucket = store
    options = ("--shard-count", 5, "--staging", tmp_path / "staging")
    assert run("build", tree, f"{bucket}/photos", *options) == 0
    assert run("build", tree, f"{bucket}/photos", *options) == 0
    assert "already built" in capsys.readouterr().out
    files.get("shelf/photos/", f"{tmp_path}/copy/", recursive=True)
    assert contents(tmp_path / "copy") == contents(shards)
    assert run("verify", f"{bucket}/photos") == 0
    assert run("inspect", f"{bucket}/photos", "--out", tmp_path / "sheet.png") == 0
    index = ShardIndex.open(f"{bucket}/photos", ShardCache(tmp_path / "cache", 10**6))
    index.check()
    here, there = ShardReader(ShardIndex.open(shards)), ShardReader(index)
    assert [there.read(row) for row in range(24)] == [here.read(row) for row in range(24)]
    here.close()
    there.close()
    files.rm("shelf/photos/shard-000002.tar")
    assert run("verify", f"{bucket}/photos") == 2
    assert "shard-000002.tar: cannot be had: no such file" in capsys.readouterr().out


def test_foreign_shards_are_indexed_and_sharded_anew(store, tmp_path: Path) -> None:
    files, bucket = store
    folder = foreign(tmp_path / "laion")
    (folder / "classes.txt").write_text("cat\ndog\n")
    files.put(str(folder), "shelf/laion", recursive=True)
    assert run("build", f"{bucket}/laion/*.tar", tmp_path / "a") == 0
    assert run("index", f"{bucket}/laion") == 0
    assert run("verify", f"{bucket}/laion") == 0
    assert run("build", f"{bucket}/laion", tmp_path / "b") == 0
    assert run("build", folder, tmp_path / "c") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_what_is_refused_is_one_message(store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, bucket = store
    for arguments, complaint in (
        (("build", f"{bucket}/nothing/here", tmp_path / "dst"), "does not exist"),
        (("index", bucket.replace("shelf", "nowhere/x")), "name a folder for the index with --out"),
        (("index", f"{bucket}/nothing"), "holds no shards"),
        (("verify", f"{bucket}/nothing"), "nor an index"),
    ):
        assert run(*arguments) == 2
        message = capsys.readouterr().err
        assert complaint in message
        assert message.count("\n") == 1
