"""What a build does with the files that lie in its destination already."""

import json
from pathlib import Path

import fsspec
import pytest

from data_prep.__main__ import main
from tests.data.pictures import contents, write_tree


def run(*arguments: object) -> int:
    return main([str(argument) for argument in (*arguments, "--workers", 1)])


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize("way", ["folder", "pattern", "link to the source", "link to the destination", "linked shards"])
def test_shards_are_never_replaced_by_what_is_built_from_them(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str, overwrite: tuple[str, ...]
) -> None:
    src: object = shards
    dst, link = shards, tmp_path / "link"
    if way == "pattern":
        src = f"{shards}/*.tar"
    elif way == "link to the source":
        link.symlink_to(shards)
        src = f"{link}/*.tar"
    elif way == "link to the destination":
        link.symlink_to(shards)
        dst = link
    elif way == "linked shards":
        link.mkdir()
        (link / "a.tar").symlink_to(shards / "shard-000001.tar")
        src = link
    before = contents(shards)
    assert run("build", src, dst, "--short-side", 8, *overwrite) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "is one of the shards to build from" in message
    assert "--overwrite" not in message
    assert contents(shards) == before


def test_shards_of_classes_that_are_left_out_are_not_replaced_either(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tree(tmp_path / "other", ("dog", "eel", "fox"), each=2)
    assert run("build", tmp_path / "other", tmp_path / "more") == 0
    for folder in (shards, tmp_path / "more"):
        (folder / "classes.txt").write_text("bird\ncat\nfox\n")
    before = contents(shards)
    assert run("build", f"{tmp_path}/[ms]*/*.tar", shards, "--classes", "fox", "--overwrite") == 2
    assert "is one of the shards to build from" in capsys.readouterr().err
    assert contents(shards) == before


def test_uploaded_shards_are_not_replaced_by_what_is_built_from_them(
    tree: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fs = fsspec.filesystem("memory")
    fs.rm("/", recursive=True)
    staging = ("--staging", tmp_path / "staging", "--overwrite")
    assert run("build", tree, "memory://bucket/shards", *staging) == 0
    before = {path: fs.cat_file(path) for path in fs.find("/bucket/shards")}
    capsys.readouterr()
    assert run("build", "memory://bucket/shards/", "memory://bucket/shards/", "--short-side", 8, *staging) == 2
    assert "is one of the shards to build from" in capsys.readouterr().err
    assert {path: fs.cat_file(path) for path in fs.find("/bucket/shards")} == before
    assert run("build", shards, "memory://bucket/shards", "--staging", shards, "--short-side", 8, "--overwrite") == 2
    assert "is one of the shards to build from" in capsys.readouterr().err
    fs.rm("/", recursive=True)


def test_shards_may_lie_within_the_folder_of_the_images(tree: Path, tmp_path: Path) -> None:
    assert run("build", tree / "cat", tree / "cat" / "shards") == 0
    assert run("build", tree / "cat", tree / "cat" / "shards", "--overwrite") == 0
    assert run("build", tree / "bird", tree / "bird") == 0
    assert len(list((tree / "bird").glob("*.jpg"))) == 12


def test_temporary_files_of_others_stay(tree: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    (dst / "folder.tmp").mkdir(parents=True)
    (dst / "index.npy.tmp").symlink_to("nowhere")
    ours = ("chunk-000001-0.tar.tmp", "chunk-000001-0.tar.tmp.tmp", "quarantine.jsonl.tmp")
    for name in ("thesis.tmp", "chunk-notes.tmp", *ours):
        (dst / name).write_text("precious")
    assert run("build", tree, dst) == 0
    assert {path.name for path in dst.glob("*.tmp")} == {"folder.tmp", "thesis.tmp", "chunk-notes.tmp"}


@pytest.mark.parametrize("name", ["classes.txt", "summary.json", "quarantine.jsonl", "index.npy"])
def test_files_of_others_are_replaced_only_on_request(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / name).write_text("precious")
    assert run("build", tree, dst) == 2
    message = capsys.readouterr().err
    assert f"{dst} holds other files ({name}): build into another folder, or replace them: --overwrite" in message
    assert [path.name for path in dst.iterdir()] == [name]
    assert (dst / name).read_text() == "precious"
    assert run("build", tree, dst, "--overwrite") == 0
    assert run("verify", dst) == 0
    assert run("build", tree, dst) == 0


def test_a_finished_build_says_how_it_knows_its_images(
    tree: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run("build", tree, shards, "--shard-count", 5) == 0
    assert capsys.readouterr().out == (
        f"already built, nothing to do: {shards} (24 samples); images are known by name, label and size alone: "
        "if any changed otherwise, --overwrite builds anew\n"
    )


def test_a_finished_build_recalls_the_images_that_it_left_out(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tree / "cat" / "cat03.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(bytes(len(whole)))
    command = ("build", tree, tmp_path / "dst", "--max-bad", 0.1)
    assert run(*command) == 0
    bad.write_bytes(whole)
    capsys.readouterr()
    assert run(*command) == 0
    assert capsys.readouterr().out == (
        f"already built, nothing to do: {tmp_path / 'dst'} (23 samples, 1 image left out then, see quarantine.jsonl); "
        "images are known by name, label and size alone: if any were mended or changed otherwise, "
        "--overwrite builds anew\n"
    )
    assert run(*command, "--overwrite") == 0
    assert json.loads((tmp_path / "dst" / "summary.json").read_text())["samples"] == 24


@pytest.mark.parametrize("name", ["shard-000002.tar", "classes.txt", "index.npy"])
def test_a_finished_build_of_which_a_file_is_lost_is_not_called_anothers(
    tree: Path, shards: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    before = contents(shards)
    (shards / name).unlink()
    assert run("build", tree, shards, "--shard-count", 5) == 2
    message = capsys.readouterr().err
    assert f"{shards}: this build was finished here, but its {name}" in message
    assert "is missing or has changed: restore it, or build all of it anew: --overwrite" in message
    assert run("build", tree, shards, "--shard-count", 5, "--overwrite") == 0
    assert contents(shards) == before


def test_a_shard_cut_short_is_named_but_other_options_are_others_shards(
    tree: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "shard-000001.tar").write_bytes(b"short")
    assert run("build", tree, shards, "--shard-count", 5) == 2
    assert "its shard-000001.tar is missing or has changed" in capsys.readouterr().err
    assert run("build", tree, shards, "--shard-count", 6) == 2
    assert "holds the shards of other images or options" in capsys.readouterr().err
