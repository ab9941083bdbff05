"""Files that are no checkpoints are told so, whatever their bytes."""

from pathlib import Path

import pytest
import torch

from ummim.checkpoint_file import read_checkpoint_file

JUNK = [
    b"",
    b"junk",
    b"PK\x03\x04junk",
    b"\x80\x02junkjunkjunk",
    b"\x80\x02}q\x00.",
    b"\x80\x02K\x01.",
    bytes(range(256)),
]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("junk", JUNK)
def test_junk_is_no_checkpoint(junk: bytes, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"junk{suffix}"
    file.write_bytes(junk)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint: "):
        read_checkpoint_file(str(file))


def test_a_missing_file_is_an_os_error() -> None:
    with pytest.raises(OSError, match="nowhere"):
        read_checkpoint_file("/nowhere/a.pth")


def test_objects_are_not_unpickled_but_named(tmp_path: Path) -> None:
    torch.save({"model": {}, "path": Path("/")}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"holds a pathlib\S*; only tensors and plain values"):
        read_checkpoint_file(str(tmp_path / "a.pth"))
    torch.save([1, 2], tmp_path / "b.pth")
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        read_checkpoint_file(str(tmp_path / "b.pth"))
