"""All commands against S3, as moto plays it. Not among the test requirements: pip install s3fs 'moto[server]'."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import locations
from tests.data.pictures import contents
from tests.data_prep.tars import foreign, run
from ummim.data import ShardIndex
from ummim.data.cache import ShardCache
from ummim.data.shards import ShardReader

REASON = "needs a package that is no requirement of the tests: pip install s3fs 'moto[server]'"
s3fs = pytest.importorskip("s3fs", reason=REASON)
moto = pytest.importorskip("moto.server", reason=REASON)
BUCKET = "s3://shelf"


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(locations, "PATIENCE_SECONDS", 1.0)
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("shelf")
    yield
    s3fs.S3FileSystem().rm("shelf", recursive=True)  # moto's buckets outlive its servers
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_shards_are_built_checked_shown_and_read(tree: Path, shards: Path, tmp_path: Path, capsys) -> None:
    options = ("--shard-count", 5, "--staging", tmp_path / "staging")
    assert run("build", tree, f"{BUCKET}/photos", *options) == 0
    assert run("build", tree, f"{BUCKET}/photos", *options) == 0
    assert "already built" in capsys.readouterr().out
    s3fs.S3FileSystem().get("shelf/photos/", f"{tmp_path}/copy/", recursive=True)
    assert contents(tmp_path / "copy") == contents(shards)
    assert run("verify", f"{BUCKET}/photos") == 0
    assert run("inspect", f"{BUCKET}/photos", "--out", tmp_path / "sheet.png") == 0
    index = ShardIndex.open(f"{BUCKET}/photos", ShardCache(tmp_path / "cache", 10**6))
    index.check()
    here, there = ShardReader(ShardIndex.open(shards)), ShardReader(index)
    assert [there.read(row) for row in range(24)] == [here.read(row) for row in range(24)]
    here.close()
    there.close()
    s3fs.S3FileSystem().rm("shelf/photos/shard-000002.tar")
    assert run("verify", f"{BUCKET}/photos") == 2
    assert "shard-000002.tar: cannot be had: no such file" in capsys.readouterr().out


def test_foreign_shards_are_indexed_and_sharded_anew(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "laion")
    (folder / "classes.txt").write_text("cat\ndog\n")
    s3fs.S3FileSystem().put(str(folder), "shelf/laion", recursive=True)
    assert run("build", f"{BUCKET}/laion/*.tar", tmp_path / "a") == 0
    assert run("index", f"{BUCKET}/laion") == 0
    assert run("verify", f"{BUCKET}/laion") == 0
    assert run("build", f"{BUCKET}/laion", tmp_path / "b") == 0
    assert run("build", folder, tmp_path / "c") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_what_is_refused_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, complaint in (
        (("build", f"{BUCKET}/nothing/here", tmp_path / "dst"), "does not exist"),
        (("index", "s3://nowhere/x"), "name a folder for the index with --out"),
        (("index", f"{BUCKET}/nothing"), "holds no shards"),
        (("verify", f"{BUCKET}/nothing"), "nor an index"),
    ):
        assert run(*arguments) == 2
        message = capsys.readouterr().err
        assert complaint in message
        assert message.count("\n") == 1
