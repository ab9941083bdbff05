"""Shards that are uploaded."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_prep import locations
from data_prep.__main__ import main
from data_prep.journal import Journal
from tests.data.pictures import contents
from ummim.data import download as downloads
from ummim.errors import DataError

DST = "memory://bucket/shards"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    monkeypatch.setattr(downloads, "_LONGEST_PAUSE", 0.01)
    fs = fsspec.filesystem("memory")
    fs.rm("/", recursive=True)
    yield fs
    fs.rm("/", recursive=True)


def build(src: Path, staging: Path, *options: str, dst: str = DST) -> int:
    arguments = ["build", str(src), dst, "--shard-count", "5", "--staging", str(staging), "--workers", "2", *options]
    return main(arguments)


def download(store: fsspec.AbstractFileSystem, folder: Path) -> dict[str, str]:
    folder.mkdir()
    for path in store.ls("/bucket/shards", detail=False):
        store.get_file(path, str(folder / path.rpartition("/")[2]))
    return contents(folder)


def test_uploaded_shards_are_the_local_ones(
    tree: Path, shards: Path, tmp_path: Path, store: fsspec.AbstractFileSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(tree, tmp_path / "staging") == 0
    assert f"24 samples in 5 shards, 0.1 MB: {DST}" in capsys.readouterr().out
    assert download(store, tmp_path / "copy") == contents(shards)
    assert list((tmp_path / "staging").iterdir()) == []
    assert build(tree, tmp_path / "staging") == 0
    assert "already built" in capsys.readouterr().out
    assert build(tree, tmp_path / "staging", "--limit", "3") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert build(tree, tmp_path / "staging", "--limit", "3", "--overwrite") == 0
    assert sorted(store.ls("/bucket/shards", detail=False)) == sorted(
        f"/bucket/shards/{name}"
        for name in ("classes.txt", "index.json", "index.npy", "shard-000000.tar", "summary.json")
    )


def test_an_upload_that_fails_leaves_no_index_and_the_next_run_goes_on(
    tree: Path, shards: Path, tmp_path: Path, store, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    capsys.readouterr()
    put, sent = store.put_file, list[str]()

    def failing(local: str, remote: str, *arguments: object, **keywords: object) -> None:
        if remote.endswith("shard-000003.tar"):
            raise ConnectionError("the line is dead")
        sent.append(remote)
        put(local, remote, *arguments, **keywords)

    monkeypatch.setattr(type(store), "put_file", staticmethod(failing))
    monkeypatch.setattr(locations, "PATIENCE_SECONDS", 0.1)
    assert build(tree, tmp_path / "staging") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{DST}/shard-000003.tar: the line is dead (given up after 0.1 s of trying without progress)" in message
    assert "the same command goes on from here" in message
    assert not store.exists("/bucket/shards/index.json")
    monkeypatch.undo()
    before = [path for path in sent if path.endswith(("shard-000000.tar", "shard-000001.tar"))]
    stamps = {path: store.modified(path) for path in before}
    assert build(tree, tmp_path / "staging") == 0
    assert stamps
    assert {path: store.modified(path) for path in before} == stamps  # not sent again
    assert download(store, tmp_path / "copy") == contents(shards)


def test_a_shard_that_arrives_short_is_sent_again(
    tree: Path, shards: Path, tmp_path: Path, store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, attempts = store.put_file, []

    def short(local: str, remote: str, *arguments: object, **keywords: object) -> None:
        attempts.append(remote)
        if attempts.count(remote) == 1 and remote.endswith(".tar"):
            store.pipe_file(remote, Path(local).read_bytes()[:-1])
        else:
            put(local, remote, *arguments, **keywords)

    monkeypatch.setattr(type(store), "put_file", staticmethod(short))
    assert build(tree, tmp_path / "staging") == 0
    monkeypatch.undo()
    assert download(store, tmp_path / "copy") == contents(shards)


def test_a_journal_that_outlives_its_shards_is_not_believed(
    tree: Path, shards: Path, tmp_path: Path, store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise DataError("stopped here")

    monkeypatch.setattr(Journal, "finish", interrupted)
    assert build(tree, tmp_path / "staging") == 2
    monkeypatch.undo()
    store.rm_file("/bucket/shards/shard-000002.tar")
    store.rm_file("/bucket/shards/index.json")
    assert build(tree, tmp_path / "staging") == 0
    assert download(store, tmp_path / "copy") == contents(shards)


def test_an_unfinished_upload_without_its_journal_is_refused(tree: Path, tmp_path: Path, store, capsys) -> None:
    store.pipe_file("/bucket/shards/shard-000000.tar", b"x")
    assert build(tree, tmp_path / "staging") == 2
    assert f"whose journal is not in {tmp_path / 'staging'}" in capsys.readouterr().err
    store.mv("/bucket/shards/shard-000000.tar", "/bucket/shards/thesis.tar")
    assert build(tree, tmp_path / "staging", "--overwrite") == 2
    assert "other tars (thesis.tar)" in capsys.readouterr().err


def test_destinations_that_take_nothing(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(tree, tmp_path / "staging", dst="https://example.invalid/shards") == 2
    assert "nothing can be written over http" in capsys.readouterr().err
    assert build(tree, tmp_path / "staging", dst=str(tmp_path / "dst")) == 2
    assert "--staging is for destinations that are URLs" in capsys.readouterr().err
    assert build(tree, tmp_path / "staging", dst="nonsense://x") == 2
    assert "Protocol not known" in capsys.readouterr().err


def test_a_file_url_is_a_folder(tree: Path, shards: Path, tmp_path: Path) -> None:
    dst = f"file://{tmp_path / 'dst'}"
    assert main(["build", str(tree), dst, "--shard-count", "5", "--workers", "1"]) == 0
    assert contents(tmp_path / "dst") == contents(shards)
    assert json.loads((tmp_path / "dst" / "index.json").read_text())["samples"] == 24


def test_a_server_that_is_asked_at_once_and_is_down_is_one_message(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locations, "PATIENCE_SECONDS", 0.1)
    down = "ftp://127.0.0.1:1/images"
    for words in (["build", down, str(tmp_path / "dst")], ["build", str(tree), down], ["index", down]):
        assert main(words) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and f"{down}: [Errno 111] Connection refused (given up after 0.1 s" in message
