import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import make_sample
from data_prep.__main__ import main
from data_prep.sources import Reading, make_key, open_source
from tests.conftest import ROOT
from tests.data.pictures import encode, picture, write_tree
from ummim.data.shards import ShardIndex, ShardReader
from ummim.errors import DataError

SAMPLE = ROOT / "ummim" / "sample_images"


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, zipped: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (30, 28, 28), np.uint8), rng.integers(0, 10, 30, np.uint8)
    labels[5] = 9
    folder.mkdir()
    for part, count in (("train", 30), ("t10k", 4)):
        for name, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            data = idx(array[:count])
            path = folder / f"{part}-{name}{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(data) if zipped else data)
    return images, labels


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_become_labelled_png(tmp_path: Path, zipped: bool) -> None:
    images, labels = write_mnist(tmp_path / "mnist", zipped)
    dst = tmp_path / "shards"
    assert main(["build", str(tmp_path / "mnist"), str(dst), "--no-shuffle", "--workers", "2"]) == 0
    index = ShardIndex.open(dst)
    assert index.classes == [str(i) for i in range(10)]
    assert index.table["label"].tolist() == labels.tolist()
    reader = ShardReader(index)
    for row in (0, 29):
        assert index.key(row) == f"train-{row:06d}"
        with Image.open(io.BytesIO(reader.read(row))) as image:
            assert image.format == "PNG"
            assert np.array_equal(np.asarray(image), images[row])


def test_one_idx_file_can_be_chosen(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist", zipped=True)
    source = open_source(tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz")
    assert [item.key for item in source.items] == [f"t10k-{i:06d}" for i in range(4)]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"hello there", "is no IDX file of unsigned bytes"),
        (b"", "is no IDX file of unsigned bytes"),
        (idx(np.zeros((3, 4, 4), np.uint8))[:-5], "holds 59 bytes, its header says 64"),
        (b"\0\0\x08\x03\0\0", "truncated or damaged"),
        (idx(np.zeros(9, np.uint8)), "holds 1-dimensional data"),
        (idx(np.zeros((0, 4, 4), np.uint8)), "holds no images"),
    ],
)
def test_broken_idx_files_are_named(tmp_path: Path, data: bytes, complaint: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(DataError, match=complaint) as caught:
        open_source(tmp_path)
    assert str(path) in str(caught.value)


def test_labels_that_do_not_fit_the_images(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((3, 4, 4), np.uint8)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(2, np.uint8)))
    with pytest.raises(DataError, match="train-labels-idx1-ubyte holds 2 labels for the 3 images"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["data.bin", "data.bin.gz", "train.idx"])
def test_a_file_of_another_name_is_not_its_own_labels(tmp_path: Path, name: str) -> None:
    data = idx(np.zeros((5, 8, 8), np.uint8))
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (tmp_path / "data.bin").write_bytes(data)  # beside data.bin.gz: the same images again
    source = open_source(tmp_path / name)
    assert source.classes is None
    assert [item.label for item in source.items] == [-1] * 5


def test_a_broken_gzip_is_named(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((3, 4, 4), np.uint8)))[:-9])
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz cannot be read"):
        open_source(tmp_path)


def test_nested_trees_take_the_first_folder_as_class(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "images", each=2)
    (root / "cat" / "indoor").mkdir()
    (root / "cat" / "indoor" / "x.png").write_bytes(encode(picture(), "PNG"))
    (root / "no images").mkdir()
    (root / ".hidden").mkdir()
    (root / ".hidden" / "y.png").write_bytes(encode(picture(), "PNG"))
    (root / "cat" / "._z.png").write_bytes(b"left behind by a Mac")
    (root / "README.md").write_text("not an image")
    (root / "cat" / "loop").symlink_to(root)
    source = open_source(root)
    assert source.classes == ["bird", "cat"]
    assert {item.key: item.label for item in source.items}["cat/indoor/x"] == 1
    assert len(source.items) == 5


def test_images_beside_class_folders_are_refused_unless_unlabelled(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "images", each=2)
    (root / "stray.jpg").write_bytes(encode(picture()))
    with pytest.raises(DataError, match=r"images beside them \(stray.jpg\)"):
        open_source(root)
    source = open_source(root, Reading(unlabelled=True))
    assert source.classes is None
    assert {item.label for item in source.items} == {-1}
    assert len(source.items) == 5


def test_keys_stay_unique_when_they_collide_again() -> None:
    used: set[str] = set()
    names = ["a.jpg", "a.png", "a.PNG", "a_png.gif", "b.c/d.e.jpg"]
    assert [make_key(name, used) for name in names] == ["a", "a_png", "a_png-2", "a_png_gif", "b_c/d_e"]


def test_the_bundled_sample_is_whole_and_licensed() -> None:
    source = open_source(SAMPLE)
    assert source.classes == sorted(make_sample.PHOTOGRAPHS)
    assert len(source.items) == 90
    assert sum(item.size for item in source.items) < 3_000_000
    licences = (SAMPLE / "LICENSES.md").read_text()
    assert all(f"\n| {name} | " in licences for name in source.classes)
    for item in source.items:
        with Image.open(item.path) as image:
            image.load()
            assert (image.mode, image.size) == ("RGB", (256, 256))


def test_crops_of_a_photograph_are_reproducible_and_differ() -> None:
    photograph = picture(3, (300, 200))
    first, again = (make_sample.crops(photograph, 5, 64, seed=1) for _ in range(2))
    assert [crop.tobytes() for crop in first] == [crop.tobytes() for crop in again]
    assert len({crop.tobytes() for crop in first}) == 5
    assert {crop.size for crop in first} == {(64, 64)}
