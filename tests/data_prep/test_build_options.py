"""What of the images a build takes, and what it says of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep import packing
from data_prep.__main__ import main
from tests.data.pictures import contents, encode, picture, write_tree
from ummim.data.shards import ShardIndex


def run(*arguments: object) -> int:
    return main([str(argument) for argument in (*arguments, "--workers", 1)])


def quarantined(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    return {Path(line["file"]).name: line["reason"] for line in lines}


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "zoo", ("ant", "bee", "cat", "dog"), each=3)


def test_a_subset_of_the_classes_is_numbered_in_its_order(zoo: Path, tmp_path: Path) -> None:
    assert run("build", zoo, tmp_path / "a", "--classes", "dog, ant") == 0
    index = ShardIndex.open(tmp_path / "a")
    assert index.classes == ["dog", "ant"]
    assert {index.key(row): int(index.table["label"][row]) for row in range(6)} == {
        f"{name}/{name}{i:02d}": label for label, name in enumerate(("dog", "ant")) for i in range(3)
    }
    (tmp_path / "classes").write_text("dog\nant\n\n")
    assert run("build", zoo, tmp_path / "b", "--classes", tmp_path / "classes") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("classes", "complaint"),
    [
        ("dog,catt", "there is no class 'catt', did you mean 'cat'?"),
        ("zebra", "there is no class 'zebra': the source has ant, bee, cat, dog"),
        ("dog,dog", "the class 'dog' comes twice"),
        (",", "name at least one"),
    ],
)
def test_classes_that_are_not_there(zoo: Path, tmp_path: Path, capsys, classes: str, complaint: str) -> None:
    assert run("build", zoo, tmp_path / "dst", "--classes", classes) == 2
    assert complaint in capsys.readouterr().err
    assert run("build", zoo / "ant", tmp_path / "dst", "--classes", "dog") == 2
    assert "no labels" in capsys.readouterr().err


def test_small_and_large_images_are_left_out_with_their_reasons(tmp_path: Path) -> None:
    src = tmp_path / "flat"
    src.mkdir()
    for name, size in {"small": (100, 15), "fits": (16, 16), "large": (60, 50)}.items():
        (src / f"{name}.jpg").write_bytes(encode(picture(size=size)))
        (src / f"{name}.png").write_bytes(encode(picture(size=size), "PNG"))
    options = ("--min-side", 16, "--max-pixels", 2999, "--max-bad", 0.7)
    assert run("build", src, tmp_path / "dst", *options) == 0
    assert quarantined(tmp_path / "dst") == {
        f"{name}.{kind}": reason
        for name, reason in {
            "small": "100x15 pixels: a side is below 16",
            "large": "60x50 pixels are more than 2999",
        }.items()
        for kind in ("jpg", "png")
    }
    assert summary(tmp_path / "dst")["quarantined"] == {
        "NxN pixels are more than N": 2,
        "NxN pixels: a side is below N": 2,
    }
    assert run("build", src, tmp_path / "dst", *options[:2], "--max-pixels", 3000, "--max-bad", 0.7, "--overwrite") == 0
    assert len(ShardIndex.open(tmp_path / "dst")) == 4


def test_a_bomb_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = tmp_path / "flat"
    src.mkdir()
    (src / "fits.png").write_bytes(encode(picture(), "PNG"))
    bomb = bytearray(encode(picture(), "PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # the header's size, whose checksum is wrong now
    (src / "bomb.png").write_bytes(bomb)
    assert run("build", src, tmp_path / "dst", "--max-bad", 0.5) == 0
    assert list(quarantined(tmp_path / "dst")) == ["bomb.png"]


def test_the_summary_counts_classes_sizes_and_kinds(zoo: Path, tmp_path: Path, capsys) -> None:
    (zoo / "dog" / "dog02.jpg").unlink()
    (zoo / "cat" / "grey.jpg").write_bytes(encode(picture(5).convert("L")))
    (zoo / "cat" / "clear.png").write_bytes(encode(picture(5).convert("RGBA"), "PNG"))
    (zoo / "cat" / "ink.jpg").write_bytes(encode(picture(5).convert("CMYK")))
    (zoo / "cat" / "text.jpg").write_text("no picture")
    assert run("build", zoo, tmp_path / "dst", "--max-bad", 0.1) == 0
    found = summary(tmp_path / "dst")
    assert found["classes"] == {"ant": 3, "bee": 3, "cat": 6, "dog": 2}
    assert found["kinds"] == {"JPEG RGB": 11, "JPEG CMYK": 1, "JPEG L": 1, "PNG RGBA": 1}
    assert found["quarantined"] == {"not an image of a format that is read": 1}
    assert (found["width"]["0%"], found["width"]["100%"]) == (40, 48)
    assert found["samples"] == len(ShardIndex.open(tmp_path / "dst")) == 14
    output = capsys.readouterr().out
    assert "4 classes; images of a class: 2 to 6, median 3\n" in output
    assert "read as: 11 JPEG RGB, 1 JPEG CMYK, 1 JPEG L, 1 PNG RGBA\n" in output
    assert (
        "1 unreadable images left out, listed in quarantine.jsonl: 1 not an image of a format that is read\n" in output
    )


@pytest.mark.parametrize("options", [(), ("--quality", 60), ("--short-side", 20)])
def test_shards_are_as_large_as_asked(tmp_path: Path, options: tuple[object, ...]) -> None:
    tree = write_tree(tmp_path / "images", each=40)
    assert run("build", tree, tmp_path / "dst", "--shard-bytes", "30kB", *options) == 0
    sizes = [shard.bytes for shard in ShardIndex.open(tmp_path / "dst").shards]
    largest_sample, end_of_tar = 3 * 1024, 10_240
    assert all(25_000 < size <= 30_000 + largest_sample + end_of_tar for size in sizes[:-1])
    assert len(sizes) > 3


def test_images_of_unknown_size_fill_shards_by_their_mean_and_never_overfill_them(tmp_path: Path) -> None:
    src = tmp_path / "flat"
    src.mkdir()
    for i in range(90):  # the later ones are larger than those that the mean is taken of
        (src / f"{i:02d}.png").write_bytes(encode(picture(i, (10, 10) if i < 70 else (300, 300)), "PNG"))
    assert run("build", src, tmp_path / "dst", "--shard-bytes", "20kB", "--quality", 90, "--no-shuffle") == 0
    index = ShardIndex.open(tmp_path / "dst")
    largest_sample, end_of_tar = int(index.table["length"].max()) + 1024, 10_240
    assert all(shard.bytes <= 20_000 + largest_sample + end_of_tar for shard in index.shards)
    assert [shard.name for shard in index.shards] == [f"shard-{i:06d}.tar" for i in range(len(index.shards))]
    assert [index.key(row) for row in range(90)] == [f"{i:02d}" for i in range(90)]


def test_a_chunk_without_a_readable_image_leaves_no_gap(tmp_path: Path) -> None:
    src = tmp_path / "flat"
    src.mkdir()
    for i in range(5):
        (src / f"{i}.jpg").write_bytes(b"x" if i in (0, 2) else encode(picture(i)))
    assert run("build", src, tmp_path / "dst", "--shard-count", 1, "--no-shuffle", "--max-bad", 0.5) == 0
    assert [shard.name for shard in ShardIndex.open(tmp_path / "dst").shards] == [
        f"shard-00000{i}.tar" for i in range(3)
    ]


def test_a_hopeless_source_is_given_up_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = tmp_path / "flat"
    src.mkdir()
    for i in range(50):
        (src / f"{i}.jpg").write_bytes(b"x")
    tried = []
    convert = packing.convert

    def counting(*arguments: Any) -> object:
        tried.append(1)
        return convert(*arguments)

    monkeypatch.setattr(packing, "convert", counting)
    assert run("build", src, tmp_path / "dst", "--max-bad", 0.1) == 2
    assert len(tried) == 6


def test_the_bar_counts_images(monkeypatch: pytest.MonkeyPatch, tree: Path, tmp_path: Path, capsys) -> None:
    from data_prep import build as building

    bars = []

    class Bar(building.tqdm):
        def __init__(self, *arguments: object, **keywords: object) -> None:
            super().__init__(*arguments, **{**keywords, "disable": False})
            bars.append(self)

    monkeypatch.setattr(building, "tqdm", Bar)
    for workers in (1, 2):
        assert main(["build", str(tree), str(tmp_path / str(workers)), "--workers", str(workers)]) == 0
    assert [bar.n for bar in bars] == [24, 24]
    assert "images/s" in capsys.readouterr().err
