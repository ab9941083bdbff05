"""``verify`` and ``inspect`` of shards behind an http server."""

import tempfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from data_prep import locations
from tests.data_prep.tars import labelled, overwrite, run
from ummim.data.shards import ShardIndex


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path)
    return labelled(tmp_path / "shards")


@pytest.fixture
def url(folder: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder.parent)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    capsys.readouterr()
    yield f"http://127.0.0.1:{server.server_port}/{folder.name}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_sound_shards_pass_and_leave_nothing_behind(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", url) == 0
    assert f"12 samples in 3 shards, no fault: {url}" in capsys.readouterr().out
    assert run("verify", url, "--fast") == 0
    assert not list((tmp_path / "tmp").iterdir())


def test_faults_are_named_as_in_a_folder(url: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    offset = int(ShardIndex.open(folder).table["offset"][1])
    overwrite(folder / "shard-0.tar", offset, b"\0" * 40)
    (folder / "shard-1.tar").unlink()
    (folder / "classes.txt").unlink()
    assert run("verify", url) == 2
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[:3] == [
        "classes.txt: is missing, but the samples are labelled",
        "shard-0.tar: its checksum is not the index's",
        f"shard-0.tar: key 'k001' at byte {offset}: the image cannot be decoded: not an image of a format that is read",
    ]
    assert lines[3].startswith("shard-1.tar: cannot be had: ")
    assert len(lines) == 4
    assert f"{url}: 4 faults (1 image, 1 index, 2 shard)" in output.err


def test_urls_without_an_index_or_a_server(
    url: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "index.json").unlink()
    assert run("verify", url) == 2
    assert "nor an index (index.json: cannot be read: No such file or directory)" in capsys.readouterr().err
    monkeypatch.setattr(locations, "PATIENCE_SECONDS", 0.0)
    assert run("verify", "http://127.0.0.1:1/shards") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_contact_sheet_lands_in_the_working_folder(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", url) == 0
    assert f"{url}: 12 samples in 3 shards" in capsys.readouterr().out
    assert (tmp_path / "inspect.png").exists()
    assert run("inspect", url, "--key", "k005") == 0
    assert "shard   shard-1.tar" in capsys.readouterr().out
