import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.data.pictures import encode, picture
from tests.data_prep.tars import foreign, image, labelled, members_of, overwrite, run, write_tar
from ummim.data.shards import ShardIndex


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    made = labelled(tmp_path / "shards")
    capsys.readouterr()
    return made


@pytest.fixture
def faults(folder: Path, capsys: pytest.CaptureFixture[str]):
    """Runs ``verify`` and returns its lines."""

    def find(*options: str) -> list[str]:
        assert run("verify", folder, *options) == 2
        output = capsys.readouterr()
        assert output.err.count("\n") == 1
        return output.out.splitlines()

    return find


def place(folder: Path, key: str) -> str:
    index = ShardIndex.open(folder)
    row = [index.key(i) for i in range(len(index))].index(key)
    return f"{index.shards[index.table['shard'][row]].name}: key {key!r} at byte {index.table['offset'][row]}"


def anonymous(where: str) -> str:
    return re.sub(r": key '\w+'", "", where)


def byte(where: str) -> int:
    return int(where.rpartition(" ")[2])


def test_sound_shards_pass(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", folder) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"12 samples in 3 shards, no fault: {folder} (")
    assert "12 images decoded" in output
    assert run("verify", folder, "--fast") == 0
    assert "no image decoded" in capsys.readouterr().out


def test_a_damaged_image_is_named(folder: Path, faults) -> None:
    where = place(folder, "k005")
    overwrite(folder / "shard-1.tar", byte(where), b"\0" * 40)
    assert faults() == [
        "shard-1.tar: its checksum is not the index's",
        f"{where}: the image cannot be decoded: not an image of a format that is read",
    ]
    assert faults("--fast") == ["shard-1.tar: its checksum is not the index's"]


def test_an_image_that_was_cut_before_it_was_packed_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = encode(picture(2), "PNG")
    write_tar(tmp_path / "x.tar", [("a.jpg", image()[:-200]), ("b.png", png[: len(png) // 2]), ("c.jpg", image())])
    assert run("index", tmp_path) == 0
    capsys.readouterr()
    assert run("verify", tmp_path) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" at byte")[0] for line in lines] == ["x.tar: key 'a'", "x.tar: key 'b'"]
    assert all("the image cannot be decoded: " in line for line in lines), lines


def test_it_goes_on_after_a_cut_and_a_missing_shard(folder: Path, faults) -> None:
    cut = folder / "shard-0.tar"
    size = cut.stat().st_size
    where = place(folder, "k003")
    offset = byte(where)
    broken = byte(place(folder, "k001"))
    cut.write_bytes(cut.read_bytes()[: offset + 100])
    overwrite(cut, broken, b"\0" * 40)
    (folder / "shard-1.tar").unlink()
    assert faults() == [
        f"shard-0.tar: truncated: {offset + 100} bytes, the index says {size}",
        f"shard-0.tar: key 'k001' at byte {broken}: the image cannot be decoded: not an image of a format that is read",
        f"shard-0.tar: key 'k003' at byte {offset - 1536}: no image, only cls",
        f"shard-0.tar: at byte {offset}: truncated: member 'k003.jpg' should end at byte "
        f"{offset + len(image(3))}, the file ends at byte {offset + 100}",
        f"{where}: in the index, but not in the shard",
        "shard-1.tar: is missing",
    ]


@pytest.mark.parametrize("keep", [0, 300, 512 + 100, 1024, 1024 + 512, 1024 + 900, 2048, 2048 + 512])
def test_a_tar_cut_anywhere_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str], keep: int) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", b"x" * 512), ("b.jpg", b"x" * 300)])  # ends at 2048, then the mark
    assert run("index", tmp_path) == 0
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:keep])
    capsys.readouterr()
    assert run("verify", tmp_path) == 2
    out = capsys.readouterr().out
    assert f"x.tar: truncated: {keep} bytes, the index says 10240" in out
    assert ": truncated: " in out.split("\n", 1)[1]
    (tmp_path / "index.json").unlink()
    assert run("index", tmp_path) == 2
    assert "x.tar: at byte" in (message := capsys.readouterr().err)
    assert "truncated" in message


def test_what_follows_a_damaged_header_is_checked(folder: Path, faults) -> None:
    where = place(folder, "k001")
    header = byte(where) - 512
    overwrite(folder / "shard-0.tar", header + 1, b"?")
    late = place(folder, "k003")
    overwrite(folder / "shard-0.tar", byte(late), b"\0" * 40)
    found = faults()
    assert f"shard-0.tar: at byte {header}: damaged: neither a member's header nor the end-of-archive mark" in found
    assert f"{where}: in the index, but not in the shard" in found
    assert f"{late}: the image cannot be decoded: not an image of a format that is read" in found
    assert len(found) == 5  # and the checksum, and a sample with its .cls alone


def test_tars_joined_by_cat_and_compressed_ones_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", image())])
    write_tar(tmp_path / "b.tar", [("b.jpg", image())])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    (tmp_path / "b.tar").unlink()
    (tmp_path / "c.tar").write_bytes(b"\x1f\x8b\x08" + bytes(600))
    assert run("verify", tmp_path) == 2
    out = capsys.readouterr().out
    assert "a.tar: at byte 1536: more members follow the end-of-archive mark" in out
    assert "c.tar: at byte 0: compressed with gzip" in out


def test_missing_members_are_named(folder: Path, faults) -> None:
    path = folder / "shard-0.tar"
    write_tar(path, [(name, data) for name, data in members_of(path) if name not in ("k001.jpg", "k002.cls")])
    found = faults()
    assert "shard-0.tar: key 'k001' at byte 2560: no image, only cls" in found
    assert "shard-0.tar: key 'k002' at byte 3584: no label (.cls), though the data is labelled" in found


@pytest.mark.parametrize("label", [b"dog", b"-3", b"", b"1.5", b"99999999999"])
def test_labels_that_are_no_numbers_are_named(folder: Path, faults, label: bytes) -> None:
    write_tar(folder / "shard-0.tar", [("k000.cls", label), ("k000.jpg", image())])
    assert f"shard-0.tar: key 'k000' at byte 512: the label in .cls is {label!r}, not a number from 0" in faults()


def test_keys_that_come_twice_are_named_with_both_places(folder: Path, faults) -> None:
    first, again = members_of(folder / "shard-0.tar"), members_of(folder / "shard-1.tar")
    write_tar(folder / "shard-1.tar", [*again[:6], *first[:2], *again[:2]])
    found = faults()
    where = anonymous(place(folder, "k000"))
    assert [line for line in found if f"the key is also in {where}: keys must be unique" in line]
    assert [line for line in found if line.startswith("shard-1.tar: key 'k004'") and "twice in this shard" in line]


def test_an_index_of_other_shards_is_found(folder: Path, faults) -> None:
    keys = [place(folder, f"k{n:03d}") for n in range(4)]
    table = np.load(folder / "index.npy")
    table["label"][3] = 9
    table["key"][1] = table["key"][0]
    table["offset"][2] += 512
    np.save(folder / "index.npy", table)
    found = "\n".join(faults())
    assert "index.npy: is not the table that index.json was made with: its checksum differs" in found
    assert f"{keys[3]}: label 9 is not one of the 2 classes" in found
    assert f"{keys[3]}: its label is 1, the index says 9" in found
    assert f"the key is also in {anonymous(keys[0])}" in found
    assert f"{keys[1]}: not in the index" in found
    offset = byte(keys[2])
    assert f"byte {offset + 512}: its offset is {offset}, the index says {offset + 512}" in found


@pytest.mark.parametrize("name", ["index.json", "index.npy", "classes.txt"])
def test_the_shards_are_checked_without_a_part_of_the_index(folder: Path, faults, name: str) -> None:
    overwrite(folder / "shard-2.tar", byte(place(folder, "k010")), b"\0" * 40)
    (folder / name).unlink()
    found = faults()
    assert found[0].startswith(f"{name}: ")
    assert found[-1].endswith("not an image of a format that is read")


def test_shards_beside_the_index_and_an_unfinished_build_are_named(folder: Path, faults) -> None:
    (folder / "shard-9.tar").write_bytes((folder / "shard-0.tar").read_bytes())
    (folder / "build.journal").touch()
    found = faults("--fast")
    assert found[0].startswith("build.journal: the build has not finished")
    assert found[1:] == ["shard-9.tar: is not in the index"]


def test_a_short_class_list_is_found(folder: Path, faults) -> None:
    (folder / "classes.txt").write_text("cat\n")
    found = faults("--fast")
    assert found[0] == "classes.txt: was changed after index.json was written: its checksum differs"
    assert f"{place(folder, 'k001')}: label 1 is not one of the 1 classes" in found
    assert len(found) == 1 + 6


def test_an_edited_index_is_found(folder: Path, faults) -> None:
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text.replace('"source": null', '"source": "me"'))
    assert faults("--fast") == ["index.json: was changed after it was written: its own checksum differs"]


def test_a_shard_outside_the_folder_is_not_opened(folder: Path, faults) -> None:
    content = json.loads((folder / "index.json").read_text())
    content["shards"][0]["name"] = "../elsewhere.tar"
    (folder / "index.json").write_text(json.dumps(content))
    assert "index.json: shard '../elsewhere.tar' does not lie in the folder" in faults()


def test_the_report_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", folder, "--json") == 0
    assert json.load(io.StringIO(capsys.readouterr().out))["faults"] == []
    where = place(folder, "k005")
    offset = byte(where)
    overwrite(folder / "shard-1.tar", offset, b"\0" * 40)
    assert run("verify", folder, "--json") == 2
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["samples"] == report["images_decoded"] == 12
    assert report["faults"][1] == {
        "file": "shard-1.tar",
        "kind": "image",
        "reason": "the image cannot be decoded: not an image of a format that is read",
        "key": "k005",
        "byte": offset,
    }
    assert "2 faults (1 image, 1 shard) in 12 samples in 3 shards" in output.err


def test_several_processes_report_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "shard-0.tar").unlink()
    overwrite(folder / "shard-2.tar", 700, b"?")
    reports = []
    for workers in ("1", "2"):
        assert run("verify", folder, "--workers", workers) == 2
        reports.append(capsys.readouterr())
    assert reports[0] == reports[1]


def test_foreign_shards_are_checked_by_the_rules_of_their_index(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "laion")
    write_tar(folder / "z.tar", [("a.b.jpg", image()), ("a.c.jpg", image()), ("a.d.txt", b"no image")])
    options = ["--last-dot", "--prefix-keys", "--skip-incomplete", "--ignore-labels", "--image", "JPG"]
    assert run("index", folder, *options) == 0
    assert run("verify", folder) == 0


def test_folders_with_nothing_to_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", tmp_path) == 2
    assert "holds neither shards (*.tar) nor an index" in capsys.readouterr().err
    (tmp_path / "index.json").write_text("{}")
    assert run("verify", tmp_path) == 2
    assert "nor an index (index.json: has no field 'format')" in capsys.readouterr().err
    assert run("verify", tmp_path / "nowhere") == 2
    assert "is no folder of shards" in capsys.readouterr().err
