"""Folders and patterns of images: what of them is taken, and what is said of the rest."""

import json
import os
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.sources import Reading, open_source, read_item
from tests.data.pictures import contents, encode, picture, write_tree
from ummim.data.shards import ShardIndex, ShardReader
from ummim.errors import DataError


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--workers", "1"])


def stored(folder: Path) -> dict[str, bytes]:
    index = ShardIndex.open(folder)
    reader = ShardReader(index)
    return {index.key(row): reader.read(row) for row in range(len(index))}


def write(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(picture(seed), "PNG"))
    return path


def test_a_pattern_takes_the_images_of_all_folders(tmp_path: Path) -> None:
    names = ["a/0", "a/1", "a/2", "b/0", "b/1", "b/2"]
    files = {name: write(tmp_path / "pat" / f"{name}.png", seed).read_bytes() for seed, name in enumerate(names)}
    assert run("build", tmp_path / "pat" / "*" / "*.png", tmp_path / "dst", "--no-shuffle") == 0
    assert stored(tmp_path / "dst") == files
    one = open_source(tmp_path / "pat" / "b" / "[01].png")
    assert [(item.key, read_item(item)) for item in one.items] == [("0", files["b/0"]), ("1", files["b/1"])]


def test_a_pattern_takes_images_of_several_depths(tmp_path: Path) -> None:
    for seed, name in enumerate(["a/x/0", "a/x/y/0", "a/xy/0"]):
        write(tmp_path / f"{name}.png", seed)
    source = open_source(f"{tmp_path}/a/**/*.png")
    assert {item.key: read_item(item) for item in source.items} == {
        name: encode(picture(seed), "PNG") for seed, name in enumerate(["x/0", "x/y/0", "xy/0"])
    }


def test_a_class_folder_without_images_by_their_suffixes_is_refused(tmp_path: Path) -> None:
    for name in ("a/0.png", "b/noext", "b/deep/x.heic", "c/2.png"):
        write(tmp_path / name)
    complaint = (
        rf"{tmp_path}/b would be a class, but none of its files \(2\) is .*\(.heic, none; .*\.webp.*--unlabelled"
    )
    with pytest.raises(DataError, match=complaint):
        open_source(tmp_path)
    assert len(open_source(tmp_path, Reading(unlabelled=True)).items) == 2
    write(tmp_path / "b" / "deep" / "1.JPG")
    assert open_source(tmp_path).classes == ["a", "b", "c"]


def test_files_that_are_left_out_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/0.png", "a/photo", "a/x.HEIC", "c/2.png", "notes.txt"):
        write(tmp_path / "src" / name)
    assert run("build", tmp_path / "src", tmp_path / "dst") == 0
    assert capsys.readouterr().err == f"{tmp_path}/src: 3 other files left out (.heic, .txt, none)\n"


def test_hidden_files_and_litter_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/0.png", "a/Thumbs.db", "b/.DS_Store", "b/Thumbs.db", "b/desktop.ini", ".git/config", "c/2.png"):
        write(tmp_path / "src" / name)
    assert run("build", tmp_path / "src", tmp_path / "dst") == 0
    assert capsys.readouterr().err == ""
    assert ShardIndex.open(tmp_path / "dst").classes == ["a", "c"]


def test_shards_inside_the_source_are_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = write_tree(tmp_path / "images", each=3)
    dst = src / "shards"
    assert run("build", src, dst) == 0
    assert run("inspect", dst) == 0
    assert (dst / "inspect.png").exists()
    before = contents(dst)
    capsys.readouterr()
    assert run("build", src, dst) == 0
    said = capsys.readouterr()
    assert "already built" in said.out
    assert said.err == f"{src}: shards left out: shards, no images\n"
    assert contents(dst) == before
    (dst / "index.json").rename(dst / "build.journal")  # unfinished shards are none, either
    assert open_source(src).classes == ["bird", "cat"]


def test_a_class_may_have_a_file_of_the_index_s_name(tmp_path: Path) -> None:
    src = write_tree(tmp_path / "images", each=3)
    (src / "cat" / "index.json").write_text("{}")
    assert open_source(src).classes == ["bird", "cat"]


def test_a_folder_of_shard_folders_says_what_to_give(shards: Path) -> None:
    with pytest.raises(DataError, match=f"holds no images itself, but shards in shards: give {shards} as SRC"):
        (shards.parent / "images").rename(shards.parent / ".hidden")
        open_source(shards.parent)


@pytest.mark.timeout(60)
def test_names_that_no_index_has_room_for_go_to_the_quarantine(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = write(tree.joinpath("a", *["d" * 250] * 4, f"{'x' * 30}.png"), 1)
    assert run("build", tree, tmp_path / "dst", "--max-bad", "0.5") == 0
    [bad] = [json.loads(line) for line in (tmp_path / "dst" / "quarantine.jsonl").read_text().splitlines()]
    assert long.name in bad["file"]
    assert "its key has 1036 bytes, more than 1024: choose shorter names" in bad["reason"]
    capsys.readouterr()
    assert run("verify", tmp_path / "dst") == 0


def test_links_to_themselves_and_pipes_go_to_the_quarantine(tree: Path, tmp_path: Path) -> None:
    (tree / "cat" / "loop.jpg").symlink_to("loop.jpg")
    (tree / "cat" / "loop").symlink_to("loop")
    os.mkfifo(tree / "cat" / "pipe.jpg")
    assert run("build", tree, tmp_path / "dst", "--max-bad", 0.2) == 0
    lines = [json.loads(line) for line in (tmp_path / "dst" / "quarantine.jsonl").read_text().splitlines()]
    assert {Path(line["file"]).name: line["reason"] for line in lines} == {
        "loop.jpg": "Too many levels of symbolic links",
        "pipe.jpg": "not a regular file",
    }
    assert len(ShardIndex.open(tmp_path / "dst")) == 24
