"""CSV and JSONL manifests as sources."""

import json
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.sources import Reading, open_source, read_item
from tests.data.pictures import encode, picture, write_tree
from ummim.data.shards import ShardIndex
from ummim.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "data", each=2)


def refused(path: Path, reading: Reading | None = None) -> str:
    with pytest.raises(DataError) as caught:
        open_source(path, reading)
    return str(caught.value)


def test_a_csv_with_class_names_builds_labelled_shards(root: Path, tmp_path: Path) -> None:
    rows = ["path,class,note", 'cat/cat00.jpg,Katze,"a, b"', "bird/bird00.jpg,Vogel,", "cat/cat01.jpg,Katze,ü"]
    (root / "list.csv").write_text("\ufeff" + "\r\n".join(rows) + "\r\n", "utf-8")
    dst = tmp_path / "dst"
    assert main(["build", str(root / "list.csv"), str(dst), "--no-shuffle", "--workers", "1"]) == 0
    index = ShardIndex.open(dst)
    assert index.classes == ["Katze", "Vogel"]
    assert [index.key(row) for row in range(3)] == ["cat/cat00", "bird/bird00", "cat/cat01"]
    assert index.table["label"].tolist() == [0, 1, 0]


def test_a_jsonl_with_numbers_and_names(root: Path) -> None:
    rows = [
        {"image": "cat/cat00.jpg", "label": 2, "class": "cat"},
        {"image": str(root / "bird/bird00.jpg"), "label": 0, "class": "bird"},
        {"image": "./bird/../bird/bird01.jpg", "label": 0, "class": "bird"},
    ]
    (root / "list.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    source = open_source(root / "list.jsonl")
    assert source.classes == ["bird", "1", "cat"]  # label 1 has no image here, and so no name
    assert [(item.key, item.label) for item in source.items] == [
        ("cat/cat00", 2),
        ("bird/bird00", 0),
        ("bird/bird01", 0),
    ]
    assert open_source(root / "list.jsonl", Reading(unlabelled=True)).classes is None


def test_paths_may_be_relative_to_another_folder(root: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "train.csv"
    path.write_text("path\ncat00.jpg\n")
    source = open_source(path, Reading(root=str(root / "cat")))
    assert source.classes is None
    assert read_item(source.items[0]) == (root / "cat" / "cat00.jpg").read_bytes()


def test_urls_are_read_where_they_lie(root: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe_file("/bucket/sub/x.jpg", encode(picture(7)))
    (root / "list.csv").write_text("path,label\nmemory://bucket/sub/x.jpg,1\ncat/cat00.jpg,0\n")
    source = open_source(root / "list.csv")
    assert [item.key for item in source.items] == ["bucket/sub/x", "cat/cat00"]
    assert read_item(source.items[0]) == encode(picture(7))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "lists no images"),
        ("path\n", "lists no images"),
        ("name,label\na.jpg,1\n", r"has no column 'path' or 'image' \(its columns: name, label\)"),
        ("path,label\ncat/cat00.jpg,1\n,2\n", "line 3: path is '', not the path of an image"),
        ("path,label\ncat/cat00.jpg,1\ncat/cat01.jpg,\n", "line 3: label is '', not a number or a name"),
        ("path,label\ncat/cat00.jpg,-1\n", "label -1 is not a number from 0"),
        ("path,label\ncat/cat00.jpg,2000000000\n", "labels number the classes from 0"),
        ("path,label\ncat/cat00.jpg,1,2\n", "line 2: not as many columns as the header has"),
        ("path,label\ncat/cat00.jpg\n", "line 2: not as many columns as the header has"),
        ("path\ncat/cat00.jpg\n./cat/cat00.jpg\n", "line 3: ./cat/cat00.jpg is in line 2 already"),
        ("path\n../secret.jpg\n", r"line 2: ../secret.jpg lies outside .*--root"),
        ("path\n/etc/passwd\n", r"line 2: /etc/passwd lies outside .*--root"),
        ("path\nfile:///etc/passwd\n", r"line 2: /etc/passwd lies outside .*--root"),
        ("path,label,class\na.jpg,0,cat\nb.jpg,0,dog\n", "line 3: label 0 is class 'dog' here, 'cat' further up"),
        ("path,label,class\na.jpg,0,cat\nb.jpg,1,cat\n", "the class 'cat' comes twice"),
        ('path,class\na.jpg,"two\nlines"\n', "has a line break in its name"),
        ('path,note\na.jpg,x\nb.jpg,"y\nc.jpg,z\nd.jpg,z\n', "line 3: unexpected end of data: .*stray quotation mark"),
        ('path,note\na.jpg,x\nb.jpg,"y\nc.jpg,"z"\nd.jpg,z\n', "line 3: .*stray quotation mark"),
        ('path,"note\na.jpg,x\n', "line 1: unexpected end of data"),
    ],
)
def test_mistakes_in_a_csv_are_named_by_line(root: Path, content: str, complaint: str) -> None:
    path = root / "list.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=complaint) as caught:
        open_source(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"path": "a.jpg"}\n{"path": \n', "line 2: no JSON"),
        ('{"path": "a.jpg"}\n["b.jpg"]\n', "line 2: .* is no JSON object"),
        ('{"path": "a.jpg"}\n{"path": 7}\n', "line 2: path is 7"),
        ('{"path": "a.jpg", "label": 0}\n{"path": "b.jpg"}\n', "line 2: label is None"),
        ('{"path": "a.jpg", "label": true}\n', "line 1: label is True"),
    ],
)
def test_mistakes_in_a_jsonl_are_named_by_line(root: Path, content: str, complaint: str) -> None:
    (root / "list.jsonl").write_text(content)
    with pytest.raises(DataError, match=complaint):
        open_source(root / "list.jsonl")


def test_a_jsonl_is_labelled_if_any_row_is(root: Path) -> None:
    path = root / "list.jsonl"
    for column in ("label", "class"):
        path.write_text(f'{{"path": "cat/cat00.jpg"}}\n{{"path": "bird/bird00.jpg", "{column}": "bird"}}\n')
        assert f"{path}, line 1: {column} is None, not a number or a name: complete it" in refused(path)
        assert open_source(path, Reading(unlabelled=True)).classes is None


def test_columns_of_parquet_are_refused_elsewhere(root: Path, shards: Path) -> None:
    path = root / "list.csv"
    path.write_text("path,kind\ncat/cat00.jpg,cat\n")
    for src in (path, root, shards, f"{shards}/*.tar"):
        assert f"--label-column kind: {src} is no Parquet" in refused(Path(src), Reading(label_column="kind"))
        assert f"--image-column path: {src} is no Parquet" in refused(Path(src), Reading(image_column="path"))


def test_other_mistakes(root: Path) -> None:
    (root / "list.csv").write_bytes("path\ncafé.jpg\n".encode("latin-1"))
    assert "cannot be read" in refused(root / "list.csv")
    (root / "list.csv").write_text("path\na.jpg\n")
    assert "--root /nowhere does not exist" in refused(root / "list.csv", Reading(root="/nowhere"))
    folder = root / "only"
    folder.mkdir()
    (folder / "list.csv").write_text("path\na.jpg\n")
    assert "holds no images, but list.csv: give it as SRC" in refused(folder)


def test_listed_images_that_are_missing_go_to_the_quarantine(root: Path, tmp_path: Path) -> None:
    (root / "list.csv").write_text("path\ncat/cat00.jpg\ncat/nowhere.jpg\n")
    arguments = [str(root / "list.csv"), str(tmp_path / "dst"), "--max-bad", "0.5", "--workers", "1"]
    assert main(["build", *arguments]) == 0
    assert "No such file" in (tmp_path / "dst" / "quarantine.jsonl").read_text()
