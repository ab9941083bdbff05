import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from tests.data.pictures import contents, encode, picture
from ummim.data.shards import ShardIndex, ShardReader

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def foreign(folder: Path, shards: int = 2, each: int = 3, label: bool = True) -> Path:
    """Shards as other tools write them: several members a sample, the image in the middle."""
    folder.mkdir()
    for s in range(shards):
        members: Members = [("__meta__", b"made elsewhere")]
        for i in range(each):
            key = f"{s:02d}{i:04d}"
            members += [(f"{key}.cls", b"%d\n" % (i % 2))] if label else []
            members += [(f"{key}.JPG", encode(picture(10 * s + i))), (f"{key}.json", b"{}"), (f"{key}.seg.png", b"?")]
        write_tar(folder / f"{s:05d}.tar", members)
    return folder


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--workers", "1"])


def test_foreign_shards_get_an_index(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "laion")
    (folder / "classes.txt").write_text("cat\ndog\n")
    assert run("index", folder) == 0
    index = ShardIndex.open(folder)
    assert [index.key(row) for row in range(6)] == ["000000", "000001", "000002", "010000", "010001", "010002"]
    assert index.table["label"].tolist() == [0, 1, 0, 0, 1, 0]
    assert ShardReader(index).read(4) == encode(picture(11))
    assert run("verify", folder) == 0


def test_indexing_again_gives_the_same_table(shards: Path) -> None:
    before = contents(shards)
    assert main(["index", str(shards), "--workers", "2"]) == 0
    after = contents(shards)
    assert {name for name in before if before[name] != after[name]} == {"index.json"}  # the build's source is unknown


def test_labels_need_a_class_list_or_are_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign(tmp_path / "laion")
    assert run("index", folder) == 2
    assert "classes.txt is missing" in capsys.readouterr().err
    (folder / "classes.txt").write_text("cat\n")
    assert run("index", folder) == 2
    assert "key '000001' has label 1, but classes.txt names 1 classes" in capsys.readouterr().err
    assert run("index", folder, "--ignore-labels") == 0
    assert ShardIndex.open(folder).classes is None


def test_unlabelled_shards_need_none(tmp_path: Path) -> None:
    assert run("index", foreign(tmp_path / "laion", label=False)) == 0


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ([("a.jpg", b"x"), ("b.json", b"{}"), ("c.jpg", b"x")], "key 'b' has no image, only json"),
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("a.jpg", b"x")], "key 'a' comes twice, again at byte 2048"),
        ([("a.jpg", b"x"), ("a.jpg", b"y")], "key 'a' comes twice, again at byte 1024"),
        ([("a.jpg", b"x"), ("a.cls", b"dog")], "key 'a' has the label b'dog'"),
        ([("a.jpg", b"x"), ("a.cls", b"-3")], "key 'a' has the label b'-3'"),
    ],
)
def test_faulty_samples_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], members: Members, complaint: str
) -> None:
    write_tar(tmp_path / "x.tar", members)
    assert run("index", tmp_path) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path}/x.tar: {complaint}" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "index.json").exists()


def test_a_key_in_two_shards_is_named_with_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x.tar", "y.tar"):
        write_tar(tmp_path / name, [(f"only-{name[0]}.jpg", b"x"), ("same.jpg", b"x")])
    assert run("index", tmp_path) == 2
    assert "key 'same' is in x.tar at byte 1536 and in y.tar at byte 1536" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [0, 300, 512 + 100, 1024, 1024 + 512, 2048, 2048 + 512])
def test_a_tar_cut_anywhere_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str], keep: int) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", b"x" * 512), ("b.jpg", b"x" * 300)])  # ends at 2048, then the mark
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:keep])
    assert run("index", tmp_path) == 2
    assert f"{tmp_path}/x.tar: truncated at byte {keep}" in capsys.readouterr().err


def test_rubbish_between_members_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", b"x" * 512), ("b.jpg", b"x" * 300)])
    whole = bytearray((tmp_path / "x.tar").read_bytes())
    whole[1024:1536] = b"?" * 512
    (tmp_path / "x.tar").write_bytes(whole)
    assert run("index", tmp_path) == 2
    assert "x.tar: damaged at byte 1024" in capsys.readouterr().err


def test_folders_without_plain_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("index", tmp_path) == 2
    assert "holds no shards (*.tar)" in capsys.readouterr().err
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    assert run("index", tmp_path) == 2
    assert "unpack compressed tars first" in capsys.readouterr().err
    (tmp_path / "y.tar").write_bytes(b"no tar at all" * 100)
    assert run("index", tmp_path) == 2
    assert "y.tar: truncated at byte 1300, or no plain tar" in capsys.readouterr().err
    write_tar(tmp_path / "y.tar", [])
    assert run("index", tmp_path) == 2
    assert "hold no samples" in capsys.readouterr().err


def flip(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def faults(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert run("verify", folder) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    return output.out.splitlines()


def test_verify_finds_a_damaged_image(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    index = ShardIndex.open(shards)
    shard, offset, key = int(index.table["shard"][7]), int(index.table["offset"][7]), index.key(7)
    flip(shards / index.shards[shard].name, offset, b"\0" * 40)
    assert faults(shards, capsys) == [
        "shard-000001.tar: its checksum is not the index's",
        f"shard-000001.tar: key {key!r} at byte {offset}: the image cannot be decoded: not an image that Pillow knows",
    ]


def test_verify_finds_a_cut_and_a_missing_shard(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    index = ShardIndex.open(shards)
    cut = shards / "shard-000000.tar"
    cut.write_bytes(cut.read_bytes()[: int(index.table["offset"][4]) + 100])
    (shards / "shard-000002.tar").unlink()
    found = faults(shards, capsys)
    assert found[0].startswith("shard-000000.tar: ")
    assert "truncated at byte" in found[1]
    assert f"key {index.key(4)!r}" in found[2]
    assert "cannot be decoded" in found[2]
    assert found[3:] == ["shard-000002.tar: No such file or directory"]


def test_verify_finds_an_index_of_other_shards(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    table = np.load(shards / "index.npy")
    keys, offsets = [str(key, "utf-8") for key in table["key"]], table["offset"].tolist()
    table["label"][3] = 9
    table["key"][1] = table["key"][0]
    table["offset"][2] += 512
    np.save(shards / "index.npy", table)
    found = "\n".join(faults(shards, capsys))
    assert "index.npy: its checksum is not the index's" in found
    assert f"key {keys[3]!r} at byte {offsets[3]}: label 9 is not one of the 2 classes" in found
    assert f"key {keys[0]!r} at byte {offsets[0]}: the key comes 2 times" in found
    assert f"key {keys[1]!r} at byte {offsets[1]}: not in the index" in found
    assert f"key {keys[2]!r} at byte {offsets[2] + 512}: offset is {offsets[2]}, the index says" in found


def test_verify_counts_the_faults_on_stderr(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "shard-000002.tar").unlink()
    assert run("verify", shards) == 2
    assert f"{shards}: 1 fault, listed above" in capsys.readouterr().err


def test_indexing_that_fails_leaves_the_old_index(shards: Path) -> None:
    before = json.loads((shards / "index.json").read_text())
    write_tar(shards / "zzz.tar", [("a.json", b"{}")])
    assert run("index", shards) == 2
    assert json.loads((shards / "index.json").read_text()) == before
