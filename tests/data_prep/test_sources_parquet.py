"""Parquet files with the images' bytes as sources."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import main
from data_prep.sources import Reading, open_source, parquet, read_item
from tests.data.pictures import contents, encode, picture
from ummim.data.shards import ShardIndex, ShardReader
from ummim.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

IMAGES = [encode(picture(i)) for i in range(20)]
LABELS = [i % 3 for i in range(20)]
NAMES = ["ant", "bee", "cat"]


def write(path: Path, columns: dict[str, Any], features: dict | None = None, rows: int = 6) -> Path:
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def hugging_face(path: Path, first: int = 0, last: int = 20) -> Path:
    """As ``datasets`` writes images, in row groups of 6."""
    images = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(IMAGES[first:last])]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": NAMES}}
    return write(path, {"image": images, "label": LABELS[first:last]}, features)


def stored(folder: Path) -> dict[str, tuple[int, bytes]]:
    index = ShardIndex.open(folder)
    reader = ShardReader(index)
    return {index.key(row): (int(index.table["label"][row]), reader.read(row)) for row in range(len(index))}


@pytest.mark.parametrize("workers", [1, 2])
def test_hugging_faces_files_become_labelled_shards(tmp_path: Path, workers: int) -> None:
    hugging_face(tmp_path / "data" / "train-00000-of-00002.parquet", 0, 15)
    hugging_face(tmp_path / "data" / "train-00001-of-00002.parquet", 15, 20)
    dst = tmp_path / "dst"
    assert main(["build", str(tmp_path / "data"), str(dst), "--shard-count", "7", "--workers", str(workers)]) == 0
    assert ShardIndex.open(dst).classes == NAMES
    keys = [f"train-00000-of-00002-{i:06d}" for i in range(15)] + [f"train-00001-of-00002-{i:06d}" for i in range(5)]
    assert stored(dst) == {key: (LABELS[i], IMAGES[i]) for i, key in enumerate(keys)}


def test_row_groups_are_shuffled_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hugging_face(tmp_path / "x.parquet")
    reads: list[int] = []
    original = parquet._row_group.__wrapped__

    def counting(path: str, column: str, number: int, process: int) -> object:
        reads.append(number)
        return original(path, column, number, process)

    monkeypatch.setattr(parquet, "_row_group", parquet.lru_cache(maxsize=1)(counting))
    for seed in (0, 1):
        parquet._row_group.cache_clear()
        assert main(["build", str(path), str(tmp_path / str(seed)), "--shuffle-seed", str(seed), "--workers", "1"]) == 0
    assert sorted(reads[:4]) == sorted(reads[4:]) == [0, 1, 2, 3]
    a, b = (list(stored(tmp_path / str(seed))) for seed in (0, 1))
    assert sorted(a) == sorted(b)
    assert a != b
    assert a != sorted(a)


def test_the_place_of_the_files_does_not_matter(tmp_path: Path) -> None:
    for place in ("a", "b"):
        hugging_face(tmp_path / place / "x.parquet")
        assert main(["build", str(tmp_path / place), str(tmp_path / f"{place}-dst"), "--workers", "1"]) == 0
    assert contents(tmp_path / "a-dst") == contents(tmp_path / "b-dst")


def test_columns_are_found_by_type_and_name_or_named(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.parquet", {"id": list(range(20)), "jpg": IMAGES, "cls": [NAMES[i] for i in LABELS]})
    source = open_source(plain)
    assert source.classes == NAMES
    assert [item.label for item in source.items] == LABELS
    assert [read_item(source.items[row]) for row in (0, 7, 19)] == [IMAGES[0], IMAGES[7], IMAGES[19]]
    two = write(tmp_path / "b.parquet", {"first": IMAGES, "second": IMAGES[::-1], "kind": LABELS})
    with pytest.raises(DataError, match=r"name it with --image-column; the columns: first \(binary\), second"):
        open_source(two)
    source = open_source(two, Reading(image_column="second", label_column="kind"))
    assert read_item(source.items[0]) == IMAGES[19]
    assert source.classes == ["0", "1", "2"]
    assert open_source(two, Reading(image_column="second")).classes is None
    with pytest.raises(DataError, match="--image-column kind is no column of bytes"):
        open_source(two, Reading(image_column="kind"))
    with pytest.raises(DataError, match="there is no --label-column sort; the columns: first, second, kind"):
        open_source(two, Reading(image_column="first", label_column="sort"))


def test_rows_without_bytes_go_to_the_quarantine(tmp_path: Path) -> None:
    images = [{"bytes": IMAGES[0], "path": None}, {"bytes": None, "path": "b.jpg"}, None]
    path = write(tmp_path / "x.parquet", {"image": images, "label": [-1, -1, -1]})
    assert main(["build", str(path), str(tmp_path / "dst"), "--max-bad", "0.7", "--workers", "1"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "dst" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in lines} == {"the row has no bytes, only the path b.jpg", "the row has no bytes"}
    assert {line["file"].partition("#")[2] for line in lines} == {"image[1]", "image[2]"}
    assert ShardIndex.open(tmp_path / "dst").classes is None  # Hugging Face's -1: a test set without labels


def test_splits_are_not_mixed(tmp_path: Path) -> None:
    hugging_face(tmp_path / "data" / "train-00000-of-00001.parquet")
    hugging_face(tmp_path / "data" / "test-00000-of-00001-abc123.parquet")
    with pytest.raises(DataError, match=r"several splits \(test, train\): give one as SRC"):
        open_source(tmp_path / "data")
    assert len(open_source(f"{tmp_path}/data/train-*.parquet").items) == 20


def test_labels_that_do_not_hold(tmp_path: Path) -> None:
    for labels, complaint in (
        ([0, None, 1], r"x.parquet#image\[1\]: its label is None"),
        ([0.5, 1.5, 2.5], "its label is 0.5"),
        ([0, -1, 1], "label -1 is not a number from 0"),
    ):
        path = write(tmp_path / "x.parquet", {"image": IMAGES[:3], "label": labels})
        with pytest.raises(DataError, match=complaint):
            open_source(path)
    features = {"label": {"_type": "ClassLabel", "names": ["ant"]}}
    path = write(tmp_path / "x.parquet", {"image": IMAGES[:3], "label": [0, 1, 2]}, features)
    with pytest.raises(DataError, match="label 2, but the metadata name 1 classes"):
        open_source(path)
    assert len(open_source(path, Reading(unlabelled=True)).items) == 3


def test_files_that_are_no_parquet_and_row_groups_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hugging_face(tmp_path / "x.parquet")
    monkeypatch.setattr(parquet, "_LARGEST", 1000)
    with pytest.raises(DataError, match="a row group of 0.0 GB would be held in memory"):
        open_source(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"x.parquet is no Parquet file, or a damaged one"):
        open_source(path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install 'ummim\[parquet\]'"):
        open_source(path)
