import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from data_prep import journal
from data_prep.__main__ import main
from tests.conftest import ROOT
from tests.data.pictures import contents, encode, picture, write_tree
from tests.data_prep.conftest import SmallDisk
from ummim.data.shards import ShardIndex, ShardReader


def run(*arguments: object) -> int:
    return main([str(argument) for argument in (*arguments, "--workers", 1)])


def test_the_command_builds_a_labelled_tree_and_says_so(tree: Path, tmp_path: Path) -> None:
    dst = tmp_path / "shards"
    command = [sys.executable, "-m", "data_prep", "build", str(tree), str(dst), "--shard-count", "10"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("24 samples in 3 shards")
    index = ShardIndex.open(dst)
    assert index.classes == ["bird", "cat"]
    assert [shard.samples for shard in index.shards] == [10, 10, 4]


def test_bytes_and_labels_come_back_by_offset(tree: Path, shards: Path) -> None:
    index = ShardIndex.open(shards)
    reader = ShardReader(index)
    for row in range(len(index)):
        key = index.key(row)
        assert reader.read(row) == (tree / f"{key}.jpg").read_bytes()
        assert index.classes is not None
        assert index.classes[index.table["label"][row]] == key.split("/")[0]


def test_webdataset_reads_the_shards(shards: Path) -> None:
    urls = sorted(str(path) for path in shards.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 24
    assert {sample["__key__"] for sample in samples} == {ShardIndex.open(shards).key(row) for row in range(24)}
    assert {sample["cls"] for sample in samples} == {b"0", b"1"}


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_any_number_of_workers_gives_the_same_bytes(tree: Path, shards: Path, tmp_path: Path, workers: int) -> None:
    dst = tmp_path / "again"
    assert main(["build", str(tree), str(dst), "--shard-count", "5", "--workers", str(workers)]) == 0
    assert contents(dst) == contents(shards)


def test_a_finished_build_is_not_repeated(tree: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert run("build", tree, shards, "--shard-count", 5) == 0
    assert "already built" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before


def test_other_shards_are_replaced_only_on_request(
    tree: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(shards)
    assert run("build", tree, shards, "--shard-count", 7) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert contents(shards) == before
    assert run("build", tree, shards, "--shard-count", 7, "--overwrite") == 0
    assert [shard.samples for shard in ShardIndex.open(shards).shards] == [7, 7, 7, 3]
    assert len(list(shards.glob("*.tar"))) == 4


def test_tars_of_others_are_never_touched(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tar").write_bytes(b"precious")
    assert run("build", tree, tmp_path, "--overwrite") == 2
    assert "thesis.tar" in capsys.readouterr().err
    assert (tmp_path / "thesis.tar").read_bytes() == b"precious"


def test_size_limit_shuffle_and_limit(tree: Path, tmp_path: Path) -> None:
    assert run("build", tree, tmp_path / "a", "--shard-bytes", "6kB", "--no-shuffle") == 0
    index = ShardIndex.open(tmp_path / "a")
    keys = [index.key(row) for row in range(24)]
    assert keys == sorted(keys)
    assert len(index.shards) > 3
    assert all(shard.bytes < 20_000 for shard in index.shards)
    assert run("build", tree, tmp_path / "b", "--limit", 9, "--shuffle-seed", 4) == 0
    assert run("build", tree, tmp_path / "c", "--shuffle-seed", 4) == 0
    b, c = ShardIndex.open(tmp_path / "b"), ShardIndex.open(tmp_path / "c")
    assert [b.key(row) for row in range(len(b))] == [c.key(row) for row in range(9)]
    assert [c.key(row) for row in range(24)] != keys
    assert b.classes == c.classes


def test_short_side_and_quality_reencode(tmp_path: Path) -> None:
    src = tmp_path / "flat"
    src.mkdir()
    picture(1, (90, 60)).save(src / "large.png")
    picture(2, (30, 40)).save(src / "small.png")
    assert run("build", src, tmp_path / "side", "--short-side", 40, "--no-shuffle") == 0
    index = ShardIndex.open(tmp_path / "side")
    reader = ShardReader(index)
    (tmp_path / "large").write_bytes(reader.read(0))
    with Image.open(tmp_path / "large") as image:
        assert (image.format, image.size) == ("JPEG", (60, 40))
    assert reader.read(1) == (src / "small.png").read_bytes()  # not shrunk: bytes kept
    assert index.classes is None
    assert run("build", src, tmp_path / "quality", "--quality", 50) == 0
    reader = ShardReader(ShardIndex.open(tmp_path / "quality"))
    assert all(reader.read(row)[:3] == b"\xff\xd8\xff" for row in (0, 1))


def test_formats_that_readers_may_not_know_become_png(tmp_path: Path) -> None:
    src = tmp_path / "flat"
    src.mkdir()
    picture(1).save(src / "a.bmp")
    picture(2).convert("CMYK").save(src / "b.tiff")
    picture(3).save(src / "c.WEBP", lossless=True)
    assert run("build", src, tmp_path / "dst", "--no-shuffle") == 0
    with tarfile.open(tmp_path / "dst" / "shard-000000.tar") as tar:
        assert tar.getnames() == ["a.png", "b.png", "c.webp"]


def test_names_with_spaces_accents_dots_and_shared_stems(tmp_path: Path) -> None:
    src = tmp_path / "ordner mit räumen"
    names = ["été 1.jpg", "été 1.png", "v1.2.final.jpeg", "写真.jpg", "写真_jpg.png", "UPPER.JPG", "line\nbreak.jpg"]
    (src / "größe XL").mkdir(parents=True)
    for i, name in enumerate(names):
        encoded = encode(picture(i), "PNG" if name.endswith("png") else "JPEG")
        (src / "größe XL" / name).write_bytes(encoded)
    (src / "größe XL" / ("long" * 60 + ".jpg")).write_bytes(encode(picture(9)))
    assert run("build", src, tmp_path / "dst") == 0
    index = ShardIndex.open(tmp_path / "dst")
    keys = {index.key(row) for row in range(len(index))}
    stems = {"été 1", "été 1_png", "v1_2_final", "写真", "写真_jpg", "UPPER", "line_break", "long" * 60}
    assert keys == {f"größe XL/{stem}" for stem in stems}
    assert index.classes == ["größe XL"]
    urls = [str(tmp_path / "dst" / "shard-000000.tar")]
    assert {sample["__key__"] for sample in webdataset.WebDataset(urls, shardshuffle=False)} == keys
    assert run("verify", tmp_path / "dst") == 0


def test_a_file_name_that_is_not_unicode(tmp_path: Path) -> None:
    src = tmp_path / "flat"
    src.mkdir()
    (src / os.fsdecode(b"caf\xe9.jpg")).write_bytes(encode(picture()))
    assert run("build", src, tmp_path / "dst") == 0
    assert ShardIndex.open(tmp_path / "dst").key(0) == "caf_"


def test_a_bad_image_whose_name_is_not_unicode_is_listed_by_it(tree: Path, tmp_path: Path) -> None:
    path = tree / "cat" / os.fsdecode(b"caf\xe9.jpg")
    path.write_bytes(b"no picture")
    assert run("build", tree, tmp_path / "dst", "--max-bad", 0.1) == 0
    line = (tmp_path / "dst" / "quarantine.jsonl").read_text("utf-8")
    assert json.loads(line)["file"] == str(path)
    assert len(ShardIndex.open(tmp_path / "dst")) == 24


def test_classes_whose_names_are_not_unicode_are_not_listed_as_one(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "bird").rename(tree / os.fsdecode(b"\xe8"))
    assert run("build", tree, tmp_path / "one") == 0
    assert ShardIndex.open(tmp_path / "one").classes == ["cat", "\ufffd"]
    (tree / "cat").rename(tree / os.fsdecode(b"\xe9"))
    capsys.readouterr()
    assert run("build", tree, tmp_path / "two") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "would all be listed as '\ufffd': rename them" in message
    assert not (tmp_path / "two").exists()


def test_bad_images_are_left_out_up_to_the_share(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "cat" / "cut.jpg").write_bytes((tree / "cat" / "cat00.jpg").read_bytes()[:-100])
    (tree / "cat" / "text.png").write_text("this is no picture")
    (tree / "cat" / "nowhere.jpg").symlink_to("not/there.jpg")
    assert run("build", tree, tmp_path / "dst", "--max-bad", 0.2) == 0
    assert "3 unreadable images left out" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "dst" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {Path(line["file"]).name: line["reason"] for line in lines}
    assert reasons["text.png"] == "not an image of a format that is read"
    assert "truncated" in reasons["cut.jpg"]
    assert reasons["nowhere.jpg"] == "No such file or directory"
    assert len(ShardIndex.open(tmp_path / "dst")) == 24


def test_too_many_bad_images_fail_the_build_and_name_the_first(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        (tree / "cat" / f"cat0{i}.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert run("build", tree, tmp_path / "dst", "--no-shuffle", "--shard-count", 4, "--max-bad", 0.1) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "cat00.jpg" in message
    assert "quarantine.jsonl" in message
    assert not (tmp_path / "dst" / "index.json").exists()
    assert len((tmp_path / "dst" / "quarantine.jsonl").read_text().splitlines()) == 3
    write_tree(tree / "mended", each=3)  # another source now: the half-built shards are not mixed in
    assert run("build", tree / "mended", tmp_path / "dst") == 0
    assert len(ShardIndex.open(tmp_path / "dst")) == 6
    assert not (tmp_path / "dst" / "quarantine.jsonl").exists()


def test_folders_without_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run("build", tmp_path / "empty", tmp_path / "dst") == 2
    assert "it is empty" in capsys.readouterr().err
    (tmp_path / "empty" / "notes.txt").write_text("x")
    assert run("build", tmp_path / "empty", tmp_path / "dst") == 2
    assert "its 1 files are none of" in capsys.readouterr().err
    (tmp_path / "empty" / "a.jpg").write_text("x")
    assert run("build", tmp_path / "empty", tmp_path / "dst", "--max-bad", 1) == 2
    assert "none of its 1 images can be read" in capsys.readouterr().err
    assert run("build", tmp_path / "missing", tmp_path / "dst") == 2
    assert "does not exist" in capsys.readouterr().err
    assert not list((tmp_path / "dst").glob("*.tar"))


def test_a_destination_that_is_a_file(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dst").write_text("x")
    assert run("build", tree, tmp_path / "dst") == 2
    assert "is not a folder" in capsys.readouterr().err


def test_two_builds_do_not_share_a_folder(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(journal, "_PATIENCE", 1)
    (tmp_path / "dst").mkdir()
    holder = (
        "import fcntl,sys,time; f=open(sys.argv[1],'a'); fcntl.flock(f,2); print('held',flush=True); time.sleep(60)"
    )
    path = str(tmp_path / "dst" / "build.journal")
    with subprocess.Popen([sys.executable, "-c", holder, path], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert run("build", tree, tmp_path / "dst") == 2
        other.kill()
    assert "another process is building" in capsys.readouterr().err


def test_a_full_disk_is_one_message_and_the_next_run_goes_on(
    tmp_path: Path, small_disk: SmallDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    src = tmp_path / "flat"
    src.mkdir()
    for i in range(60):
        picture(i, (160, 120)).save(src / f"{i:02d}.png")  # about 30 kB each
    assert run("build", src, small_disk.folder, "--shard-count", 1) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"disk full while writing {small_disk.folder}/" in message
    assert not (small_disk.folder / "index.json").exists()
    finished = sorted(small_disk.folder.glob("*.tar"))
    assert finished
    for path in finished:
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == 1
    small_disk.enlarge()
    stamps = {path: path.stat().st_mtime_ns for path in finished}
    assert run("build", src, small_disk.folder, "--shard-count", 1) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == stamps  # not written again
    assert run("build", src, tmp_path / "reference", "--shard-count", 1) == 0
    assert contents(small_disk.folder) == contents(tmp_path / "reference")
