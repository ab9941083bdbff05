"""``index`` of shards behind URLs: beside them where files can be written, else in a folder of its own."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_prep import locations
from tests.data.pictures import contents
from tests.data_prep.tars import foreign, image, run, write_tar
from tests.data_prep.web import Handler, served
from ummim.data import DataConfig, ShardIndex, download
from ummim.data.cache import ShardCache
from ummim.data.shards import ShardReader

URL = "memory://bucket/laion"


@pytest.fixture(autouse=True)
def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(download, "_LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(locations, "PATIENCE_SECONDS", 0.2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = foreign(tmp_path / "web" / "laion")
    (made / "classes.txt").write_text("cat\ndog\n")
    return made


@pytest.fixture
def web(folder: Path) -> Iterator[str]:
    pytest.importorskip("aiohttp")
    with served(folder.parent) as url:
        yield f"{url}/laion"


@pytest.fixture
def store(folder: Path) -> Iterator[fsspec.AbstractFileSystem]:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/laion", recursive=True)
    yield memory
    memory.rm("/", recursive=True)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run("index", *arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_the_index_of_a_store_lies_beside_the_shards_and_is_the_local_one(store, folder: Path, tmp_path: Path) -> None:
    assert run("index", URL) == 0
    assert run("index", folder) == 0
    for name in ("index.json", "index.npy"):
        assert store.cat_file(f"/bucket/laion/{name}") == (folder / name).read_bytes()
    assert sorted(path.rpartition("/")[2] for path in store.ls("/bucket/laion", detail=False)) == sorted(
        path.name for path in folder.iterdir()
    )
    assert run("verify", URL) == 0
    assert not [path for path in (tmp_path / "tmp").iterdir() if "cache" not in path.name]


def test_the_index_of_a_web_server_lies_in_a_folder_that_is_read_like_any(web: str, tmp_path: Path, capsys) -> None:
    assert "nothing can be written over http: name a folder for the index with --out" in refusal(capsys, web)
    out = tmp_path / "index"
    assert run("index", web, "--out", out) == 0
    assert capsys.readouterr().out == f"6 samples in 2 shards, 0.0 MB: {out}\n"
    assert sorted(path.name for path in out.iterdir()) == ["classes.txt", "index.json", "index.npy"]
    cache = DataConfig(str(out), cache_size="1GB", retry_seconds=5).shard_cache()
    assert cache is not None
    assert (cache.limit, cache.retry_seconds) == (10**9, 5)
    index = ShardIndex.open(out, ShardCache(tmp_path / "cache", 10**6))
    index.check()
    reader = ShardReader(index)
    assert reader.read(4) == image(11)
    assert (index.key(4), index.classes) == ("010001", ["cat", "dog"])
    reader.close()
    assert run("verify", out) == 0
    assert run("inspect", out, "--out", tmp_path / "sheet.png") == 0
    assert run("build", out, tmp_path / "a") == 0
    assert run("build", tmp_path / "web" / "laion", tmp_path / "b") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_folder_with_other_classes_or_with_shards_takes_no_index(
    web: str, folder: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "index"
    assert run("index", web, "--out", out) == 0
    assert run("index", web, "--out", out) == 0
    before = contents(out)
    (folder / "classes.txt").write_text("ant\nzebra\n")
    assert "classes.txt is not the class list of http" in refusal(capsys, web, "--out", out)
    assert contents(out) == before
    shards = foreign(tmp_path / "mine")
    assert "holds shards, which have an index of their own" in refusal(capsys, web, "--out", shards)


def test_faults_of_shards_behind_an_index_of_its_own_are_found(web: str, folder: Path, tmp_path: Path, capsys) -> None:
    assert run("index", web, "--out", tmp_path / "index") == 0
    (folder / "00001.tar").unlink()
    assert run("verify", tmp_path / "index") == 2
    assert "00001.tar: cannot be had: HTTP 404" in capsys.readouterr().out
    content = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps({**content, "url": "/etc"}))
    assert run("verify", tmp_path / "index") == 2
    assert "index.json: field 'url' is '/etc'" in capsys.readouterr().err
    assert run("inspect", tmp_path / "index") == 2
    assert "says that the shards lie in '/etc', which is no URL" in capsys.readouterr().err


def test_a_store_that_takes_no_files_is_told_before_anything_is_read(
    store, tmp_path: Path, monkeypatch, capsys
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(store), "pipe_file", refuse)
    monkeypatch.setattr(type(store), "cat_file", lambda *_, **__: pytest.fail("read"))
    message = refusal(capsys, URL)
    assert f"{URL} takes no files (Access Denied): name a folder for the index with --out" in message


def test_shards_in_folders_below_and_none_at_all(store, tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "x.tar", [("x.jpg", image())])
    store.put_file(str(tmp_path / "x.tar"), "/bucket/nested/train/x.tar")
    store.pipe_file("/bucket/nested/y.tar.gz", b"x")
    message = refusal(capsys, "memory://bucket/nested")
    assert "memory://bucket/nested holds no shards (*.tar), but y.tar.gz: unpack compressed tars first" in message
    assert run("index", "memory://bucket/nested", "--recursive") == 0
    assert [shard.name for shard in ShardIndex.open("memory://bucket/nested").shards] == ["train/x.tar"]
    assert "--out is for shards behind a URL" in refusal(capsys, tmp_path, "--out", tmp_path / "index")


def test_an_index_that_fails_leaves_the_old_one(web: str, store, tmp_path: Path, capsys) -> None:
    assert run("index", URL) == 0
    before = store.cat_file("/bucket/laion/index.json")
    store.pipe_file("/bucket/laion/zzz.tar", b"no tar at all" * 100)
    assert f"{URL}/zzz.tar: at byte 0: no plain tar" in refusal(capsys, URL)
    assert store.cat_file("/bucket/laion/index.json") == before
    Handler.failing = {"/laion/00001.tar": -1}
    message = refusal(capsys, web, "--out", tmp_path / "index")
    assert "00001.tar: HTTP 503 Service Unavailable (given up after 0.2 s" in message
    assert not (tmp_path / "index" / "index.json").exists()
