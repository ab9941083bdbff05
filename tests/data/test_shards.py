import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from ummim.data import ShardIndex
from ummim.data import shards as shards_module
from ummim.data.shards import ShardReader
from ummim.errors import DataError


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        ShardIndex.open(folder)
    return str(caught.value)


def test_an_index_describes_its_shards(folder: Path) -> None:
    index = ShardIndex.open(folder)
    assert len(index) == 26
    assert index.first.tolist() == [0, 4, 8, 12, 16, 20, 24, 26]
    assert index.classes == ["bird", "cat"]
    assert len(index.digest) == 64
    assert index.key(0).split("/")[0] in index.classes
    index.check()


def test_the_digest_follows_every_byte_of_the_data(folder: Path, tmp_path: Path) -> None:
    first = ShardIndex.open(folder).digest
    assert ShardIndex.open(str(folder)).digest == first
    (tmp_path / "images" / "cat" / "cat03.jpg").write_bytes((tmp_path / "images" / "cat" / "cat04.jpg").read_bytes())
    assert main(["build", str(tmp_path / "images"), str(tmp_path / "other"), "--shard-count", "4"]) == 0
    assert ShardIndex.open(tmp_path / "other").digest != first


def test_pickling_an_index_does_not_carry_its_table(folder: Path) -> None:
    index = ShardIndex.open(folder)
    data = pickle.dumps(index)
    assert len(data) < 300
    copy = pickle.loads(data)  # noqa: S301  (our own bytes)
    assert copy.digest == index.digest
    assert isinstance(copy.table, np.memmap)


def test_missing_parts_are_named_with_a_remedy(folder: Path, tmp_path: Path) -> None:
    assert "python -m data_prep build SRC" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "there are no shards" in refused(tmp_path / "empty")
    (folder / "classes.txt").rename(tmp_path / "classes.txt")
    assert f"{folder}/classes.txt is missing, but the samples are labelled" in refused(folder)
    (tmp_path / "classes.txt").rename(folder / "classes.txt")
    (folder / "index.npy").rename(tmp_path / "index.npy")
    assert f"{folder}/index.npy is missing or broken" in refused(folder)
    (folder / "index.json").unlink()
    assert f"{folder}/index.json is missing: make it from the shards: python -m data_prep index" in refused(folder)


def test_broken_parts_are_named_with_a_remedy(folder: Path) -> None:
    good = (folder / "index.json").read_text()
    for text in ("", "[]", '{"shards": 3}', good[:100]):
        (folder / "index.json").write_text(text)
        assert "is no index" in refused(folder)
    (folder / "index.json").write_text(json.dumps({**json.loads(good), "format": "ummim-shards-9"}))
    assert "has format 'ummim-shards-9'" in refused(folder)
    (folder / "index.json").write_text(good)
    table = np.load(folder / "index.npy")
    np.save(folder / "index.npy", table[:-1])
    assert "has shape (25,), but index.json lists 26 samples" in refused(folder)
    np.save(folder / "index.npy", np.zeros(26))
    assert "python -m data_prep index" in refused(folder)
    (folder / "index.npy").write_bytes(b"\x93NUMPY")
    assert "missing or broken" in refused(folder)


def compressed(table: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, table)
    return file.getvalue()


def saved(table: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, table, allow_pickle=True)
    return file.getvalue()


def renamed(table: np.ndarray) -> np.ndarray:
    kinds = [(f"{name}s", table.dtype[name]) for name in table.dtype.names or ()]
    return table.astype(np.dtype(kinds))


def retyped(table: np.ndarray, **kinds: str) -> np.ndarray:
    return table.astype(np.dtype([(name, kinds.get(name, table.dtype[name])) for name in table.dtype.names or ()]))


BROKEN: dict[str, Callable[[np.ndarray], bytes]] = {
    "zip": compressed,
    "cut zip": lambda table: compressed(table)[:50],
    "pickle": lambda table: pickle.dumps(table.tolist()),
    "objects": lambda table: saved(table.astype(object)),
    "other fields": lambda table: saved(renamed(table)),
    "text keys": lambda table: saved(retyped(table, key="<U30")),
    "float offsets": lambda table: saved(retyped(table, offset="<f8")),
    "big-endian labels": lambda table: saved(retyped(table, label=">i4")),
    "no fields": lambda table: saved(np.zeros(len(table))),
    "two dimensions": lambda table: saved(table[None]),
    "scalar": lambda table: saved(np.array(3)),
    "header of rubbish": lambda table: saved(table)[:20] + b"(((((" + saved(table)[25:],
    "huge shape": lambda table: saved(table).replace(b"(26,)", b"(9999999999999999,)"),
    "negative shape": lambda table: saved(table).replace(b"(26,)", b"(-6,)"),
    "header only": lambda table: saved(table)[:8],
    "cut": lambda table: saved(table)[:-1],
    "text": lambda table: b"a table, as it were",
    "nothing": lambda table: b"",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_table_of_any_other_kind_is_one_message(folder: Path, kind: str) -> None:
    path = folder / "index.npy"
    path.write_bytes(BROKEN[kind](np.load(path)))
    message = refused(folder)
    assert str(path) in message
    assert f"again: python -m data_prep index {folder}" in message
    assert "\n" not in message


def test_a_folder_in_the_place_of_the_table_is_one_message(folder: Path) -> None:
    (folder / "index.npy").unlink()
    (folder / "index.npy").mkdir()
    assert "Is a directory" in refused(folder)


def test_check_finds_missing_and_resized_shards(folder: Path) -> None:
    index = ShardIndex.open(folder)
    path = folder / "shard-000003.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=f"{path} has {len(whole) - 1} bytes, its index says {len(whole)}: truncated"):
        index.check()
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: No such file or directory: restore the shard"):
        index.check()


def test_reading_names_shard_key_and_byte(folder: Path) -> None:
    index = ShardIndex.open(folder)
    reader = ShardReader(index)
    reader.read(0)
    path = folder / "shard-000000.tar"
    os.truncate(path, int(index.table["offset"][3]) + 10)  # cut while it is open
    with pytest.raises(DataError, match="the shard ends early") as caught:
        reader.read(3)
    offset = index.table["offset"][3]
    assert str(caught.value).startswith(f"{path}: key {index.key(3)!r} at byte {offset}: ")
    with pytest.raises(DataError, match="truncated"):
        ShardReader(index).read(3)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        ShardReader(index).read(3)


def test_a_reader_keeps_few_files_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_OPEN_FILES", 2)
    index = ShardIndex.open(folder)
    reader = ShardReader(index)
    before = _open_files()
    data = [reader.read(row) for row in (0, 5, 9, 0, 25, 12, 5)]
    assert _open_files() - before == 2
    assert data[0] == data[3]
    assert data[1] == data[6]
    reader.close()
    assert _open_files() == before


def test_opening_a_large_index_is_fast_and_small(folder: Path) -> None:
    """1.28 million rows: opened by mapping, not by reading."""
    content = json.loads((folder / "index.json").read_text())
    shard = content["shards"][0]
    content["shards"] = [{**shard, "name": f"{i:06d}.tar", "samples": 1000} for i in range(1281)]
    (folder / "index.json").write_text(json.dumps(content))
    np.lib.format.open_memmap(folder / "index.npy", "w+", shards_module.table_dtype(26), (1_281_000,)).flush()
    resident = _resident()
    index = ShardIndex.open(folder)
    assert len(index) == 1_281_000
    assert _resident() - resident < 30e6


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("key", ["shards", "labelled", "table_sha256", "source"])
def test_an_index_without_a_key_is_refused(folder: Path, key: str) -> None:
    content = json.loads((folder / "index.json").read_text())
    content.pop(key)
    (folder / "index.json").write_text(json.dumps(content))
    assert "not a whole index" in refused(folder)


def test_an_index_with_a_foreign_shard_entry_is_refused(folder: Path) -> None:
    content = json.loads((folder / "index.json").read_text())
    content["shards"][0]["colour"] = "red"
    (folder / "index.json").write_text(json.dumps(content))
    assert "not a whole index" in refused(folder)
