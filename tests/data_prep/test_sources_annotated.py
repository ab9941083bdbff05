"""iNaturalist's annotation files as sources."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import main
from data_prep.sources import Reading, open_source, read_item
from tests.data.pictures import write_tree
from ummim.data.shards import ShardIndex
from ummim.errors import DataError

SPECIES = [{"id": 5, "name": "Turdus merula", "supercategory": "Aves"}, {"id": 2, "name": "Felis catus"}]


def entry(number: int, name: str) -> dict[str, Any]:
    return {"id": number, "width": 48, "height": 40, "file_name": f"{name}/{name}{number % 10:02d}.jpg", "license": 3}


@pytest.fixture
def held(tmp_path: Path) -> dict[str, Any]:
    """Two images of each of two species, beside a folder of the images."""
    write_tree(tmp_path, each=2)
    images = [entry(20, "cat"), entry(11, "bird"), entry(10, "bird"), entry(21, "cat")]
    species = {"bird": 5, "cat": 2}
    return {
        "info": {"year": 2018},
        "images": images,
        "annotations": [
            {"id": 7 * image["id"], "image_id": image["id"], "category_id": species[image["file_name"].split("/")[0]]}
            for image in reversed(images)
        ],
        "categories": SPECIES,
    }


def write(folder: Path, held: Any) -> Path:
    path = folder / "train2018.json"
    path.write_text(json.dumps(held))
    return path


def test_labels_follow_the_categories_ids(held: dict[str, Any], tmp_path: Path) -> None:
    source = open_source(write(tmp_path, held))
    assert source.classes == ["Felis catus", "Turdus merula"]
    assert [(item.key, item.label) for item in source.items] == [
        ("cat/cat00", 0),
        ("bird/bird01", 1),
        ("bird/bird00", 1),
        ("cat/cat01", 0),
    ]
    assert read_item(source.items[0]) == (tmp_path / "cat/cat00.jpg").read_bytes()
    assert source.items[0].size == (tmp_path / "cat/cat00.jpg").stat().st_size


def test_a_category_without_images_keeps_its_label(held: dict[str, Any], tmp_path: Path) -> None:
    """The training and the validation file list the same categories, not images of all of them."""
    held["categories"] = [*SPECIES, {"id": 3, "name": "Lynx lynx"}]
    source = open_source(write(tmp_path, held))
    assert source.classes == ["Felis catus", "Lynx lynx", "Turdus merula"]
    assert {item.label for item in source.items} == {0, 2}


def test_names_that_repeat_give_way_to_ids(held: dict[str, Any], tmp_path: Path) -> None:
    held["categories"] = [{"id": 5, "name": "x"}, {"id": 2, "name": "x"}]
    assert open_source(write(tmp_path, held)).classes == ["2", "5"]


def test_images_lie_below_another_root(held: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    path = write(tmp_path / "lists", held)
    source = open_source(path, Reading(root=str(tmp_path)))
    assert read_item(source.items[1]) == (tmp_path / "bird/bird01.jpg").read_bytes()


def test_test_images_without_annotations_and_unlabelled_ones(held: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, held)
    assert open_source(path, Reading(unlabelled=True)).classes is None
    del held["annotations"], held["categories"]
    source = open_source(write(tmp_path, held))
    assert source.classes is None
    assert {item.label for item in source.items} == {-1}


def test_shards_are_built_and_missing_images_are_told(
    held: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, held)
    build = ["build", str(path), str(tmp_path / "dst"), "--no-shuffle", "--workers", "1"]
    assert main(build) == 0
    index = ShardIndex.open(tmp_path / "dst")
    assert index.classes == ["Felis catus", "Turdus merula"]
    assert index.table["label"].tolist() == [0, 1, 1, 0]
    (tmp_path / "bird/bird00.jpg").unlink()
    capsys.readouterr()
    assert main([*build[:2], str(tmp_path / "other"), *build[3:]]) == 2
    assert "bird00.jpg" in capsys.readouterr().err
    assert main([*build[:2], str(tmp_path / "third"), *build[3:], "--max-bad", "0.5"]) == 0
    assert "bird00.jpg" in (tmp_path / "third" / "quarantine.jsonl").read_text()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"images": []}, "it has no list images"),
        ({"images": {"id": 1}}, "images is no list of objects"),
        ({"categories": []}, "no list categories"),
        ({"categories": [SPECIES[0]]}, "annotation 147: there is no category 2"),
        ({"categories": [*SPECIES, SPECIES[0]]}, "the id 5 comes twice in categories"),
        ({"categories": [*SPECIES, {"id": "x"}]}, "numbers and names"),
        ({"categories": [*SPECIES, {"name": "x"}]}, r"categories\[2\] has the id None"),
        ({"categories": [SPECIES[0], {"id": 2, "name": "a\nb"}]}, "line break"),
        ({"+images": entry(20, "bird")}, "the id 20 comes twice in images"),
        ({"+images": entry(30, "cat") | {"file_name": "cat/cat00.jpg"}}, "cat/cat00.jpg is image 20's already"),
        ({"+images": entry(31, "cat") | {"file_name": "../x.jpg"}}, r"image 31: ../x.jpg lies outside"),
        ({"+images": {"id": 32}}, "image 32: file_name is None"),
        ({"+images": entry(33, "cat") | {"file_name": "cat/new.jpg"}}, "image 33: has no annotation"),
        ({"+annotations": {"id": 1, "image_id": 99, "category_id": 2}}, "annotation 1: there is no image 99"),
        ({"+annotations": {"id": 2, "image_id": 20, "category_id": 5}}, "image 20 has two categories"),
        ({"+annotations": {"id": 3, "image_id": [1], "category_id": 2}}, r"there is no image \[1\]"),
    ],
)
def test_mistakes_name_the_id(held: dict[str, Any], change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    for key, value in change.items():
        if key.startswith("+"):
            held[key[1:]].append(value)
        else:
            held[key] = value
    with pytest.raises(DataError, match=f"train2018.json.*{complaint}"):
        open_source(write(tmp_path, held))


def test_what_is_no_annotation_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "train2018.json"
    for text, complaint in (("{", "cannot be read as JSON"), ("[1]", "no annotation file"), ("{}", "no list images")):
        path.write_text(text)
        with pytest.raises(DataError, match=f"train2018.json.*{complaint}"):
            open_source(path)
    path.write_text("{}")
    with pytest.raises(DataError, match="holds no images, but train2018.json: give it as SRC"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="--root /nowhere does not exist"):
        open_source(path, Reading(root="/nowhere"))
