"""ImageNet's tars and shards as sources."""

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.sources import Reading, open_source, read_item
from tests.data.pictures import contents, encode, picture
from tests.data_prep.archives import (
    TRUTH,
    WNIDS,
    devkit,
    foreign_shards,
    imagenet_train,
    imagenet_validation,
    packed_devkit,
    tar,
    unpacked_imagenet,
)
from ummim.data.shards import ShardIndex, ShardReader
from ummim.errors import DataError


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--workers", "1"])


def test_the_training_tar_and_its_unpacked_tree_give_the_same_shards(tmp_path: Path) -> None:
    tree = unpacked_imagenet(tmp_path / "tree")
    packed = imagenet_train(tree, tmp_path / "ILSVRC2012_img_train.tar")
    for options in ("--no-shuffle", "--overwrite"):
        for src, dst in ((tree, "a"), (packed, "b")):
            assert run("build", src, tmp_path / dst, "--shard-count", 4, options) == 0
        assert contents(tmp_path / "a") == contents(tmp_path / "b")
    index = ShardIndex.open(tmp_path / "b")
    assert index.classes == sorted(WNIDS.values())
    assert {index.key(row) for row in range(15)} >= {"n01440764/n01440764_0", "n02119789/n02119789_35"}


def test_workers_index_the_training_tar_together(tmp_path: Path) -> None:
    path = imagenet_train(unpacked_imagenet(tmp_path / "tree"), tmp_path / "train.tar")
    assert open_source(path, workers=2) == open_source(path, workers=1)
    assert {item.label for item in open_source(path, Reading(unlabelled=True)).items} == {-1}


def test_validation_labels_are_the_devkits_in_the_order_of_wordnet_ids(tmp_path: Path) -> None:
    images = imagenet_validation(tmp_path / "ILSVRC2012_img_val.tar")
    kit = devkit(tmp_path / "kit")
    source = open_source(tmp_path / "ILSVRC2012_img_val.tar", Reading(devkit=str(kit)))
    assert source.classes == sorted(WNIDS.values())
    names = [WNIDS[number] for number in TRUTH]
    found = {item.key: (source.classes[item.label], read_item(item)) for item in source.items}
    assert found == {
        f"{wnid}/ILSVRC2012_val_{i:08d}": (wnid, data)
        for i, (wnid, data) in enumerate(zip(names, images, strict=True), 1)
    }
    packed_devkit(kit, tmp_path / "ILSVRC2012_devkit_t12.tar.gz")  # found beside the tar
    assert open_source(tmp_path / "ILSVRC2012_img_val.tar") == source
    assert open_source(tmp_path) == source  # the folder that holds one of ImageNet's tars


def test_validation_without_or_with_a_wrong_devkit(tmp_path: Path) -> None:
    path = tmp_path / "ILSVRC2012_img_val.tar"
    imagenet_validation(path)
    with pytest.raises(DataError, match=r"put ILSVRC2012_devkit_t12.tar.gz beside it.*--unlabelled"):
        open_source(path)
    assert len(open_source(path, Reading(unlabelled=True)).items) == 5
    short = devkit(tmp_path / "short", TRUTH[:3])
    with pytest.raises(DataError, match="has no class for ILSVRC2012_val_00000004.JPEG"):
        open_source(path, Reading(devkit=str(short)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is no ImageNet devkit"):
        open_source(path, Reading(devkit=str(tmp_path / "empty")))
    (tmp_path / "text.tar.gz").write_text("text")
    with pytest.raises(DataError, match="is no ImageNet devkit"):
        open_source(path, Reading(devkit=str(tmp_path / "text.tar.gz")))


def test_a_folder_of_several_imagenet_tars_is_refused(tmp_path: Path) -> None:
    imagenet_train(unpacked_imagenet(tmp_path / "tree"), tmp_path / "train.tar")
    imagenet_validation(tmp_path / "val.tar")
    with pytest.raises(DataError, match=r"images of several kinds"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"holds ImageNet's tars \(train.tar, val.tar\): give one of them"):
        open_source(f"{tmp_path}/*.tar")


def test_truncated_and_damaged_tars_are_named(tmp_path: Path) -> None:
    tree = unpacked_imagenet(tmp_path / "tree")
    path = imagenet_train(tree, tmp_path / "train.tar")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train.tar: at byte \d+: truncated: .* restore it"):
        open_source(path)
    damaged = bytearray(whole)
    damaged[512:1024] = b"?" * 512  # the first inner header
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"train.tar: n02119789.tar: at byte 512: (damaged|no plain tar)"):
        open_source(path)
    path.write_bytes(b"no tar" * 400)
    with pytest.raises(DataError, match="no plain tar"):
        open_source(path)
    path.write_bytes(tar([("n01.tar", tar([])), ("readme", b"x")]))
    with pytest.raises(DataError, match=r"tars and other files beside them \(readme\)"):
        open_source(path)


def test_shards_of_others_are_sharded_anew_with_their_keys(tmp_path: Path) -> None:
    src = foreign_shards(tmp_path / "laion")
    assert run("build", src, tmp_path / "dst", "--shard-count", 4) == 0
    index = ShardIndex.open(tmp_path / "dst")
    reader = ShardReader(index)
    assert index.classes == ["0", "1"]
    assert [shard.samples for shard in index.shards] == [4, 2]
    found = {index.key(row): (int(index.table["label"][row]), reader.read(row)) for row in range(6)}
    assert found == {f"part.{s}/{s:02d}{i:04d}": (i % 2, encode(picture(10 * s + i))) for s in (0, 1) for i in range(3)}


def test_an_index_makes_no_difference_to_the_shards_made_anew(tmp_path: Path) -> None:
    src = foreign_shards(tmp_path / "laion")
    (src / "classes.txt").write_text("cat\ndog\n")
    assert run("build", src, tmp_path / "a") == 0
    assert run("index", src) == 0
    assert run("build", src, tmp_path / "b") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert ShardIndex.open(tmp_path / "b").classes == ["cat", "dog"]


def test_our_shards_in_another_order_and_size(shards: Path, tmp_path: Path, tree: Path) -> None:
    options = ("--shard-count", 7, "--shuffle-seed", 3)
    assert run("build", shards, tmp_path / "again", *options) == 0
    assert run("build", tree, tmp_path / "direct", *options) == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "direct")


def test_shards_that_cannot_be_sharded_anew(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    image = encode(picture())
    for members, complaint in (
        ([("a.cls", b"cat"), ("a.jpg", image)], "key 'a' has the label b'cat' in .cls"),
        ([("../a.jpg", image)], r"key '../a' leads out of the folder"),
        ([("/etc/a.jpg", image)], "key '/etc/a' leads out of the folder"),
        ([("a.jpg", image), ("a.jpg", image)], "key 'a' comes twice"),
        ([("a.jpg", image), ("b.jpg", image), ("a.jpg", image)], "key 'a' is in .* keys must be unique"),
        (
            [("a.jpg", image), ("b.cls", b"0"), ("b.jpg", image)],
            r"x.tar: a at byte 512: no label, .*\(1 such",
        ),
        ([], "holds no samples"),
    ):
        (src / "x.tar").write_bytes(tar(members))
        with pytest.raises(DataError, match=complaint):
            open_source(src)
    (src / "x.tar").write_bytes(tar([("a.cls", b"2"), ("a.jpg", image)]))
    (src / "classes.txt").write_text("cat\n")
    with pytest.raises(DataError, match=r"label 2, but classes.txt names 1 classes"):
        open_source(src)


def test_a_sample_without_an_image_goes_to_the_quarantine(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    (src / "x.tar").write_bytes(tar([("a.json", b"{}"), ("b.jpg", encode(picture()))]))
    assert run("build", src, tmp_path / "dst", "--max-bad", 0.5) == 0
    line = json.loads((tmp_path / "dst" / "quarantine.jsonl").read_text())
    assert line["reason"] == "the sample has no image"
    assert "x.tar: a at byte" in line["file"]


def test_hard_links_in_a_tar_are_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tmp_path / "tree"
    for name, seed in (("a/0", 0), ("a/1", 1), ("b/2", 2)):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / f"{name}.jpg").write_bytes(encode(picture(seed)))
        (tree / f"{name}.cls").write_text(f"{seed}")
    for twin in ("b/0", "c/0"):
        (tree / twin).parent.mkdir(exist_ok=True)
        os.link(tree / "a/0.jpg", tree / f"{twin}.jpg")
        os.link(tree / "a/0.cls", tree / f"{twin}.cls")
    (tree / "c/3.jpg").symlink_to("0.jpg")
    os.link(tree / "c/3.jpg", tree / "c/4.jpg", follow_symlinks=False)
    subprocess.run(["tar", "cf", tmp_path / "x.tar", "--sort=name", "-C", tree, "."], check=True)
    source = open_source(tmp_path / "x.tar")
    assert {item.key: item.label for item in source.items} == {
        "./a/0": 0,
        "./a/1": 1,
        "./b/0": 0,
        "./b/2": 2,
        "./c/0": 0,
    }
    assert all(read_item(item) == (tree / f"{item.key}.jpg").read_bytes() for item in source.items)
    assert "x.tar: 2 members left out, links or special files (./c/3.jpg, ...)" in capsys.readouterr().err


def test_a_hard_link_to_nothing_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        link = tarfile.TarInfo("b/0.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a/0.jpg"
        file.addfile(link)
    with pytest.raises(DataError, match=r"x.tar: member 'b/0.jpg' is a hard link to 'a/0.jpg', which does not stand"):
        open_source(tmp_path / "x.tar")


def test_an_unfinished_build_is_no_source(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "build.journal").write_text("{}\n")
    for remains in ("with its index", "without"):
        for src in (shards, f"{shards}/shard-*.tar", shards / "shard-000001.tar"):
            assert run("build", src, tmp_path / "dst") == 2, remains
            message = capsys.readouterr().err
            assert message.endswith(f"{shards} holds an unfinished build: run that build to its end first\n")
        (shards / "index.json").unlink(missing_ok=True)


@pytest.mark.timeout(60)
def test_a_pipe_called_a_tar_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "x.tar")
    for src in (tmp_path, tmp_path / "x.tar"):
        assert run("build", src, tmp_path / "dst") == 2
        assert f"{tmp_path}/x.tar cannot be read: not a regular file" in capsys.readouterr().err


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match="no random access: unpack it first"):
        open_source(tmp_path / "x.tar.gz")
