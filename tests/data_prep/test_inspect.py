from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.contact_sheet import SIDE, Cell, contact_sheet
from data_prep.histogram import bars, histogram
from tests.data.pictures import encode, picture
from tests.data_prep.tars import foreign, image, labelled, overwrite, run, write_tar
from ummim.data.shards import ShardIndex


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    made = labelled(tmp_path / "shards")
    capsys.readouterr()
    return made


def test_it_describes_labelled_shards_and_draws_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", folder) == 0
    out = capsys.readouterr().out
    assert f"{folder}: 12 samples in 3 shards, 0.1 MB, 2 classes\nsamples a shard: 4 to 4" in out
    assert "width in pixels, all: 12 to 12, median 12\n  12 12 100.0% ####" in out
    assert "width / height, all: 1.2 to 1.2" in out
    assert "formats, all\n  JPEG RGB 12 100.0%" in out
    assert "samples a class: 6 to 6, median 6\n  0 cat 6  50.0%" in out
    assert out.endswith(f"contact sheet: {folder / 'inspect.png'}\n")
    with Image.open(folder / "inspect.png") as sheet:
        assert sheet.size[0] == 8 * (SIDE + 8) + 8
        assert len(sheet.getcolors(2**24) or []) > 100
    assert run("verify", folder) == 0  # the picture is no part of the data set


def test_unlabelled_foreign_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign(tmp_path / "laion", label=False)
    assert run("index", folder) == 0
    assert run("inspect", folder, "--out", tmp_path / "sheet.png", "--samples", "3") == 0
    out = capsys.readouterr().out
    assert "unlabelled" in out
    assert "samples a class" not in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] == 3 * (SIDE + 8) + 8
    assert not (folder / "inspect.png").exists()


def test_the_same_seed_draws_the_same_samples(folder: Path, tmp_path: Path) -> None:
    sheets = []
    for seed in ("1", "1", "2"):
        assert run("inspect", folder, "--out", tmp_path / "x.png", "--samples", "4", "--seed", seed) == 0
        sheets.append((tmp_path / "x.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_samples_that_cannot_be_decoded_are_shown_as_such(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = ShardIndex.open(folder)
    overwrite(folder / "shard-0.tar", int(index.table["offset"][1]), b"\0" * 40)
    assert run("inspect", folder, "--workers", "2") == 0
    assert "  unreadable  1   8.3%" in capsys.readouterr().out
    assert run("inspect", folder, "--key", "k001") == 0
    assert "fault   the image cannot be decoded: not an image of a format that is read" in capsys.readouterr().out


def test_a_sample_by_its_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", folder, "--key", "k005") == 0
    table = ShardIndex.open(folder).table
    assert capsys.readouterr().out.splitlines() == [
        "key     k005",
        "row     5",
        "shard   shard-1.tar",
        f"offset  {table['offset'][5]}",
        f"length  {len(image(5))}",
        "label   1 dog",
        "image   JPEG RGB, 12 x 10",
    ]
    assert not (folder / "inspect.png").exists()
    assert run("inspect", folder, "--key", "k05") == 2
    assert "has no sample with the key 'k05'; its keys look like 'k000'" in capsys.readouterr().err


def test_many_classes_and_odd_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [(1, 1), (1, 90), (300, 2)] + [(10 + i, 10 + 3 * i) for i in range(37)]
    members = []
    for i, size in enumerate(sizes):
        members += [(f"{i}.cls", b"%d" % min(i, 29)), (f"{i}.png", encode(picture(i, size).convert("P"), "PNG"))]
    write_tar(tmp_path / "x.tar", members)
    (tmp_path / "classes.txt").write_text("".join(f"class with a name {i}\n" for i in range(40)))
    assert run("index", tmp_path) == 0
    assert run("inspect", tmp_path, "--measure", "20") == 0
    out = capsys.readouterr().out
    assert "20 images evenly spaced" in out
    assert "10 classes have none; the 8 largest and the 8 smallest\n  29 class with a name 29" in out
    assert "PNG P" in out


def test_an_unwritable_place_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", folder, "--out", folder / "nowhere" / "x.png") == 2
    assert "nowhere/x.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["inspect", "x", "--samples", "0"], ["inspect", "x", "--measure", "many"], ["index", "x", "--image", "jpg,,png"]],
)
def test_a_wrong_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert f"usage: python -m data_prep {arguments[0]}" in capsys.readouterr().err


def test_a_sheet_holds_any_key_and_caption() -> None:
    cells = [
        Cell("a/very/long/path/" * 10 + "0001", "7 " + "word " * 30, picture(0, (SIDE, 3))),
        Cell("\udce4猫\n", "", None, "a long reason " * 30),
        Cell("", "", picture(1, (1, SIDE))),
    ]
    assert contact_sheet(cells).size == (3 * (SIDE + 8) + 8, SIDE + 54)


@pytest.mark.parametrize("values", [[0], [0, 1e9], [3] * 5, range(1000), [0.1, 0.2] * 10, np.geomspace(1, 1e9, 50)])
def test_a_histogram_counts_every_value(values) -> None:
    lines = histogram("title", np.array(values)).splitlines()[1:]
    assert 1 <= len(lines) <= 10
    assert sum(int(line.split("%")[0].split()[-2].replace(",", "")) for line in lines) == len(values)


def test_bars_show_the_smallest_count_and_nothing_for_none() -> None:
    assert bars("t", {"a": 1000, "bb": 1, "c": 0}).splitlines() == [
        "t",
        "  a  1,000  99.9% " + "#" * 40,
        "  bb     1   0.1% #",
        "  c      0   0.0%",
    ]
