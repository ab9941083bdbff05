"""Sources behind URLs."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_prep import locations
from data_prep.__main__ import main
from data_prep.sources import Reading, open_source, read_item
from tests.data.pictures import contents, encode, picture
from tests.data_prep.archives import (
    devkit,
    foreign_shards,
    imagenet_train,
    imagenet_validation,
    packed_devkit,
    unpacked_imagenet,
)
from tests.data_prep.web import Handler, served
from ummim.data import download
from ummim.errors import DataError

pytest.importorskip("aiohttp")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_LONGEST_PAUSE", 0.01)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "web").mkdir()
    with served(tmp_path / "web") as url:
        yield url


def build(src: object, dst: Path, *options: str, workers: int = 1) -> int:
    return main(["build", str(src), str(dst), "--shard-count", "4", "--workers", str(workers), *options])


def test_a_tree_on_a_web_server_gives_the_shards_of_the_local_one(web: str, tmp_path: Path) -> None:
    tree = unpacked_imagenet(tmp_path / "web" / "tree")
    assert [item.key for item in open_source(f"{web}/tree/").items] == [item.key for item in open_source(tree).items]
    assert build(f"{web}/tree/", tmp_path / "a", workers=2) == 0
    assert build(tree, tmp_path / "b") == 0
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {name for name in b if a[name] != b[name]} <= {"index.json"}  # web servers do not list sizes


def test_tars_on_a_web_server_are_read_in_parts(web: str, tmp_path: Path) -> None:
    imagenet_train(unpacked_imagenet(tmp_path / "tree"), tmp_path / "web" / "train.tar")
    assert build(f"{web}/train.tar", tmp_path / "a", workers=2) == 0
    assert build(tmp_path / "web" / "train.tar", tmp_path / "b") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    images = imagenet_validation(tmp_path / "web" / "val.tar")
    packed_devkit(devkit(tmp_path / "kit"), tmp_path / "web" / "kit.tar.gz")
    source = open_source(f"{web}/val.tar", Reading(devkit=f"{web}/kit.tar.gz"))
    assert sorted(read_item(item) for item in source.items) == sorted(images)


def test_shards_and_manifests_in_an_object_store(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    src = foreign_shards(tmp_path / "laion")
    store.put(str(src), "/bucket/laion", recursive=True)
    assert build("memory://bucket/laion", tmp_path / "a") == 0
    assert build("memory://bucket/laion/*.tar", tmp_path / "b") == 0
    assert build(src, tmp_path / "c") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    store.pipe_file("/bucket/lists/x/cat.jpg", encode(picture(3)))
    store.pipe_file("/bucket/lists/list.csv", b"path,class\nx/cat.jpg,cat\n")
    source = open_source("memory://bucket/lists/list.csv")
    assert [(item.key, read_item(item)) for item in source.items] == [("x/cat", encode(picture(3)))]
    store.pipe_file("/bucket/lists/list.csv", b"path\nx/../../cat.jpg\n")
    with pytest.raises(DataError, match="lies outside memory://bucket/lists"):
        open_source("memory://bucket/lists/list.csv")


def test_an_unfinished_build_that_was_copied_to_a_store(tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(str(foreign_shards(tmp_path / "laion")), "/bucket/part", recursive=True)
    fsspec.filesystem("memory").pipe_file("/bucket/part/build.journal", b"{}")
    with pytest.raises(DataError, match="memory://bucket/part holds an unfinished build: run that build to its end"):
        open_source("memory://bucket/part")


def test_a_pattern_of_images_over_several_folders(web: str, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for i, name in enumerate(["a/0", "a/1", "b c/0", "b c/1%"]):
        store.pipe_file(f"/bucket/pattern/{name}.png", encode(picture(i), "PNG"))
        (tmp_path / "web" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "web" / f"{name}.png").write_bytes(encode(picture(i), "PNG"))
    for place in ("memory://bucket/pattern", web, str(tmp_path / "web")):
        source = open_source(f"{place}/*/*.png")
        assert [(item.key, read_item(item)) for item in source.items] == [
            (name, encode(picture(i), "PNG")) for i, name in enumerate(["a/0", "a/1", "b c/0", "b c/1%"])
        ]


def test_parquet_on_a_web_server(web: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from tests.data_prep.test_sources_parquet import hugging_face

    hugging_face(tmp_path / "web" / "x.parquet")
    assert build(f"{web}/x.parquet", tmp_path / "a", workers=2) == 0
    assert build(tmp_path / "web" / "x.parquet", tmp_path / "b") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    tree = unpacked_imagenet(tmp_path / "tree")
    assert open_source(f"file://{tree}") == open_source(tree)


def test_a_server_that_stumbles_is_asked_again(web: str, tmp_path: Path) -> None:
    unpacked_imagenet(tmp_path / "web" / "tree")
    Handler.failing = {"/tree/n01440764/n01440764_0.JPEG": 2}
    assert build(f"{web}/tree/", tmp_path / "dst") == 0
    assert not (tmp_path / "dst" / "quarantine.jsonl").exists()


def test_a_server_that_fails_stops_the_build_and_the_next_run_goes_on(
    web: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locations, "PATIENCE_SECONDS", 0.1)
    tree = unpacked_imagenet(tmp_path / "web" / "tree")
    path = "/tree/n02119789/n02119789_7.JPEG"
    Handler.failing = {path: -1}
    assert build(f"{web}/tree/", tmp_path / "dst", "--max-bad", "1") == 2  # not an image's fault: not a quarantine
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{web}{path}: HTTP 503 Service Unavailable (given up after 0.1 s" in message
    assert not list((tmp_path / "dst").glob("*.tmp"))
    Handler.failing = {}
    assert build(f"{web}/tree/", tmp_path / "dst") == 0
    assert build(tree, tmp_path / "reference") == 0
    assert contents(tmp_path / "dst")["index.npy"] == contents(tmp_path / "reference")["index.npy"]


def test_images_that_are_gone_or_refused_go_to_the_quarantine(web: str, tmp_path: Path) -> None:
    (tmp_path / "web" / "list.csv").write_text("path\na.jpg\nb.jpg\nc.jpg\n")
    for name in ("a.jpg", "c.jpg"):
        (tmp_path / "web" / name).write_bytes(encode(picture()))
    Handler.failing, Handler.code = {"/c.jpg": -1}, 403
    assert build(f"{web}/list.csv", tmp_path / "dst", "--max-bad", "0.7") == 0
    left_out = sorted((tmp_path / "dst" / "quarantine.jsonl").read_text().splitlines())
    assert [json.loads(line) for line in left_out] == [
        {"file": f"{web}/b.jpg", "reason": "HTTP 404 File not found"},
        {"file": f"{web}/c.jpg", "reason": "HTTP 403 Forbidden"},
    ]


def test_names_with_blanks_and_marks_are_those_of_the_local_tree(web: str, tmp_path: Path) -> None:
    tree = tmp_path / "web" / "tree"
    for name in ("grün/eine Katze.jpg", "grün/50% #1?.jpg", "a b/+&=.jpg"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(encode(picture(len(name))))
    here, there = open_source(tree), open_source(f"{web}/tree/")
    assert [item.key for item in there.items] == [item.key for item in here.items]
    assert there.classes == here.classes
    assert [read_item(item) for item in there.items] == [read_item(item) for item in here.items]


def test_tars_of_a_server_that_knows_no_parts_are_refused(web: str, tmp_path: Path, monkeypatch) -> None:
    foreign_shards(tmp_path / "web" / "laion")
    monkeypatch.setattr(Handler, "parts", False)
    with pytest.raises(DataError, match="00000.tar: its server does not serve parts of files: download it first"):
        open_source(f"{web}/laion/")


@pytest.mark.parametrize(
    ("src", "complaint"),
    [
        ("nonsense://x/y", "nonsense://x/y cannot be opened: Protocol not known"),
        ("simplecache::memory://x", "chained URLs"),
        ("memory://nowhere/at/all", "does not exist"),
        ("memory://nowhere/*.tar", "no file fits this pattern"),
        ("http://127.0.0.1:1/x.tar", r"Connection refused \(given up after 0.1 s.*the same command goes on from here"),
    ],
)
def test_urls_that_lead_nowhere(src: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(DataError, match=complaint):
        open_source(src)
