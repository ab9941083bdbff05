import json
import tarfile
from pathlib import Path

import pytest

from tests.data_prep.tars import Members, foreign, image, labelled, overwrite, run, write_tar
from ummim.data.shards import ShardIndex, ShardReader


def keys(folder: Path) -> list[str]:
    index = ShardIndex.open(folder)
    return [index.key(row) for row in range(len(index))]


def images(folder: Path) -> list[bytes]:
    index = ShardIndex.open(folder)
    reader = ShardReader(index)
    return [reader.read(row) for row in range(len(index))]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run("index", *arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_foreign_shards_get_an_index(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "laion")
    (folder / "classes.txt").write_text("cat\ndog\n")
    assert run("index", folder) == 0
    assert keys(folder) == ["000000", "000001", "000002", "010000", "010001", "010002"]
    assert ShardIndex.open(folder).table["label"].tolist() == [0, 1, 0, 0, 1, 0]
    assert images(folder)[4] == image(11)
    assert run("verify", folder) == 0


def test_img2dataset_shards_need_no_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for s in range(2):
        members: Members = []
        for i in range(3):
            key = f"{s:05d}{i:04d}"
            caption = json.dumps({"caption": "a cat", "key": key, "status": "success"}).encode()
            members += [(f"{key}.jpg", image(i)), (f"{key}.json", caption), (f"{key}.txt", b"a cat")]
        write_tar(tmp_path / f"{s:05d}.tar", members)
        (tmp_path / f"{s:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"{s:05d}_stats.json").write_text("{}")
    assert run("index", tmp_path) == 0
    assert capsys.readouterr().out == f"6 samples in 2 shards, 0.0 MB: {tmp_path}\n"
    assert keys(tmp_path)[3] == "000010000"
    assert ShardIndex.open(tmp_path).classes is None
    assert run("verify", tmp_path) == 0


def test_indexing_again_and_by_more_processes_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = labelled(tmp_path / "shards")
    before = [(folder / name).read_bytes() for name in ("index.json", "index.npy")]
    assert run("index", folder, "--workers", "2") == 0
    assert before == [(folder / name).read_bytes() for name in ("index.json", "index.npy")]


def test_labels_need_a_class_list_or_are_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign(tmp_path / "laion")
    assert f"classes.txt is missing, but the samples are labelled: write it (one class name a line, in label order; "\
           f"numbers will do: seq 0 1 > {folder}/classes.txt)" in refusal(capsys, folder)  # fmt: skip
    (folder / "classes.txt").write_text("cat\n")
    assert "key '000001' has label 1, but classes.txt names 1 classes" in refusal(capsys, folder)
    assert run("index", folder, "--ignore-labels") == 0
    assert ShardIndex.open(folder).classes is None
    assert run("verify", folder) == 0


def test_labels_from_a_field_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    labels = ["1", '"0"', "0"]
    members = [m for i, label in enumerate(labels)
               for m in ((f"{i}.jpg", image()), (f"{i}.json", f'{{"label": {label}}}'.encode()))]  # fmt: skip
    write_tar(tmp_path / "x.tar", members)
    assert run("index", tmp_path, "--label-field", "label") == 0
    assert ShardIndex.open(tmp_path).table["label"].tolist() == [1, 0, 0]
    assert run("verify", tmp_path) == 0
    for wrong in (b'{"label": true}', b'{"label": 1.5}', b'{"label": "cat"}', b'{"label": [1]}', b'{"label": -1}'):
        write_tar(tmp_path / "x.tar", [("a.jpg", image()), ("a.json", wrong)])
        assert "the label in field 'label' of .json is" in refusal(capsys, tmp_path, "--label-field", "label")
    write_tar(tmp_path / "x.tar", [("a.jpg", image()), ("a.json", b"{")])
    assert "its .json is not JSON" in refusal(capsys, tmp_path, "--label-field", "label")


def test_samples_without_a_label_among_labelled_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    write_tar(tmp_path / "x.tar", [("a.jpg", image()), ("a.cls", b"1")])
    write_tar(tmp_path / "y.tar", [("b.jpg", image()), ("c.jpg", image()), ("c.cls", b"0")])
    assert "y.tar: key 'b' at byte 512: no label, but others have one (1 such samples)" in refusal(capsys, tmp_path)
    assert run("index", tmp_path, "--skip-incomplete") == 0
    assert "1 incomplete samples left out" in capsys.readouterr().out
    assert keys(tmp_path) == ["a", "c"]
    assert run("verify", tmp_path) == 0


def test_samples_without_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", image()), ("b.json", b"{}"), ("c.jpg", image())])
    message = refusal(capsys, tmp_path)
    assert f"{tmp_path}/x.tar: key 'b' at byte 1536: no image, only json" in message
    assert "--skip-incomplete" in message
    assert not (tmp_path / "index.json").exists()
    assert run("index", tmp_path, "--skip-incomplete") == 0
    assert keys(tmp_path) == ["a", "c"]


def test_the_image_among_several_is_chosen_by_its_extension(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "x.tar", [("a.PNG", image(1)), ("a.jpg", image(2)), ("a.seg.png", image(3))])
    for options, expected in (([], 2), (["--image", "png,jpg"], 1), (["--image", ".seg.png"], 3)):
        assert run("index", tmp_path, *options) == 0
        assert images(tmp_path) == [image(expected)]
        noted = "1 samples with several images" in capsys.readouterr().out
        assert noted == (expected != 3)
        assert run("verify", tmp_path) == 0
    assert "key 'a' at byte 0: no image (gif), only jpg, png, seg.png" in refusal(capsys, tmp_path, "--image", "gif")


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (["n01/a.jpg", "n02/a.jpg"], [], ["n01/a", "n02/a"]),
        (["./v1.0/a.jpg"], [], ["./v1.0/a"]),
        (["img.1.jpg", "img.2.jpg"], ["--last-dot"], ["img.1", "img.2"]),
        (["größe/猫.jpg"], [], ["größe/猫"]),
        (["a" * 300 + "/" + "b" * 200 + ".jpg"], [], ["a" * 300 + "/" + "b" * 200]),
        (["a.jpg", "._a.jpg", "README", ".hidden", "__notes__", "__meta__.json"], [], ["a"]),
    ],
)
@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_become_keys(
    tmp_path: Path, names: list[str], options: list[str], expected: list[str], kind: int
) -> None:
    write_tar(tmp_path / "x.tar", [(name, image(i)) for i, name in enumerate(names)], kind)
    assert run("index", tmp_path, *options) == 0
    assert keys(tmp_path) == expected
    assert images(tmp_path) == [image(i) for i in range(len(expected))]
    assert run("verify", tmp_path) == 0


def test_names_in_another_encoding_stay_distinct(tmp_path: Path) -> None:
    for path, name in ((tmp_path / "x.tar", b"\xe4"), (tmp_path / "y.tar", b"\xe5")):
        write_tar(path, [("Q.jpg", image())])
        header = bytearray(path.read_bytes()[:512])
        header[0:1] = name
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        overwrite(path, 0, bytes(header))
    assert run("index", tmp_path) == 0
    assert keys(tmp_path) == ["\\udce4", "\\udce5"]


def test_links_and_sparse_files_are_ignored_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", image())])
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        for name, kind in (("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.SYMTYPE), ("folder.d", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
    assert run("index", tmp_path) == 0
    assert "2 members ignored" in capsys.readouterr().out
    assert keys(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("a.jpg", b"x")], "key 'a' at byte 2048: the key comes twice"),
        ([("a.jpg", b"x"), ("a.jpg", b"y")], "key 'a' at byte 1024: the key comes twice in this shard, both times"),
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("a.cls", b"1")], "key 'a' at byte 2048: the key comes twice"),
        ([("a.jpg", b"x"), ("a.cls", b"dog")], "key 'a' at byte 1536: the label in .cls is b'dog', not a number"),
        ([("a.jpg", b"x"), ("a.cls", b"-3")], "key 'a' at byte 1536: the label in .cls is b'-3', not a number"),
        ([("a" * 1100 + ".jpg", b"x")], "the key has 1100 bytes, more than 1024"),
    ],
)
def test_faulty_samples_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], members: Members, complaint: str
) -> None:
    write_tar(tmp_path / "x.tar", members)
    message = refusal(capsys, tmp_path)
    assert f"{tmp_path}/x.tar: " in message
    assert complaint in message
    assert not (tmp_path / "index.json").exists()


def test_a_key_in_two_shards_is_refused_or_gets_the_shards_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x.tar", "y.tar"):
        write_tar(tmp_path / name, [(f"only-{name[0]}.jpg", image()), ("same.jpg", image())])
    message = refusal(capsys, tmp_path)
    assert "key 'same' is in x.tar at byte 2048 and in y.tar at byte 2048 (1 such keys)" in message
    assert "--prefix-keys" in message
    assert run("index", tmp_path, "--prefix-keys") == 0
    assert keys(tmp_path) == ["x/only-x", "x/same", "y/only-y", "y/same"]
    assert run("verify", tmp_path) == 0


def test_nested_shards_only_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train/0.tar", "val/0.tar"):
        write_tar(tmp_path / name, [(f"{name[0]}.jpg", image())])
    assert "holds no shards itself, but 2 in folders below (train/0.tar)" in refusal(capsys, tmp_path)
    assert run("index", tmp_path, "--recursive") == 0
    assert [shard.name for shard in ShardIndex.open(tmp_path).shards] == ["train/0.tar", "val/0.tar"]
    assert images(tmp_path) == [image(), image()]
    assert run("verify", tmp_path) == 0
    write_tar(tmp_path / "top.tar", [("z.jpg", image())])
    assert run("index", tmp_path) == 0
    assert keys(tmp_path) == ["z"]


def test_empty_shards_stay_in_the_index(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [])
    write_tar(tmp_path / "1.tar", [("a.jpg", image())])
    write_tar(tmp_path / "2.tar", [])
    assert run("index", tmp_path) == 0
    index = ShardIndex.open(tmp_path)
    assert index.first.tolist() == [0, 0, 1, 1]
    assert index.table["shard"].tolist() == [1]
    assert run("verify", tmp_path) == 0


def test_folders_without_plain_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no shards (*.tar)" in refusal(capsys, tmp_path)
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    assert "unpack compressed tars first" in refusal(capsys, tmp_path)
    (tmp_path / "y.tar").write_bytes(b"no tar at all" * 100)
    assert "y.tar: at byte 0: no plain tar" in refusal(capsys, tmp_path)
    write_tar(tmp_path / "y.tar", [])
    assert "hold no samples" in refusal(capsys, tmp_path)
    (tmp_path / "z.tar").symlink_to("nowhere")
    assert "z.tar cannot be read: No such file" in refusal(capsys, tmp_path)


def test_rubbish_between_members_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", b"x" * 512), ("b.jpg", b"x" * 300)])
    overwrite(tmp_path / "x.tar", 1024, b"?" * 512)
    assert "x.tar: at byte 1024: damaged" in refusal(capsys, tmp_path)


def test_indexing_that_fails_leaves_the_old_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = labelled(tmp_path / "shards")
    before = (folder / "index.json").read_bytes()
    write_tar(folder / "zzz.tar", [("a.json", b"{}")])
    refusal(capsys, folder)
    assert (folder / "index.json").read_bytes() == before
