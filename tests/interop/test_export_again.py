"""An export into a Hugging Face folder that holds an earlier one, and more."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.interop.exports import CHECKPOINT, tiny
from ummim.__main__ import main
from ummim.errors import UserError
from ummim.interop import publish
from ummim.interop.certificate import verify
from ummim.interop.export import export

pytest.importorskip("transformers", reason="pip install 'ummim[huggingface]'")

OTHERS = (".git/HEAD", "LICENSE", "notes/a.txt", ".gitattributes")


def make(out: Path, name: str = "mae") -> Path:
    recipe, method = tiny(name)
    return export(recipe, method, CHECKPOINT, out, "huggingface", encoder_only=True).path


def run_of(out: Path) -> str:
    return str(json.loads((out / "certificate.json").read_text())["source"]["run"])


def clone(out: Path) -> Path:
    """An export with what a clone of its repository has beside it."""
    make(out)
    for name in OTHERS:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    return out


def test_only_the_earlier_export_is_replaced(tmp_path: Path) -> None:
    out = clone(tmp_path / "hub")
    make(out, "um_mae_vit")
    assert all((out / name).read_text() == "mine" for name in OTHERS)
    assert run_of(out) == "um_mae_vit" and "# um_mae_vit" in (out / "README.md").read_text()
    assert verify(out)[0]
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "preprocessor_config.json", "model.safetensors", "certificate.json", "README.md"),
        *(".git", "LICENSE", "notes", ".gitattributes"),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]
    files = [path.stat() for path in out.iterdir() if path.is_file()]
    assert all(file.st_nlink == 1 and file.st_mode & 0o444 == 0o444 for file in files)


@pytest.mark.parametrize("linked", [True, False])
def test_a_failure_before_the_first_name_changes_nothing(
    linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = clone(tmp_path / "hub")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    full = OSError(28, "No space left on device")

    def fail(*_: Any) -> None:
        raise full

    monkeypatch.setattr(publish.shutil, "copyfile", fail)
    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(OSError, match="No space"):
        make(out, "um_mae_vit")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]
    monkeypatch.undo()
    if not linked:
        monkeypatch.setattr(os, "link", fail)  # a file system without such links
    make(out, "um_mae_vit")
    assert run_of(out) == "um_mae_vit" and verify(out)[0]


@pytest.mark.parametrize("after", range(5))
def test_a_kill_between_two_names_leaves_a_whole_export(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain, count = clone(tmp_path / "hub"), Path.replace, 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal count
        if target.parent == out:
            count += 1
            if count > after:
                raise KeyboardInterrupt
        return plain(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        make(out, "um_mae_vit")
    monkeypatch.undo()
    left = tmp_path / ".hub.partial" / "hub"
    assert run_of(left) == "um_mae_vit" and verify(left)[0]
    assert run_of(out) == "mae" and verify(out)[0] == (after < 2)  # the card is the first, the certificate the last
    publish.mend(left.parent, out)  # which the next export does
    assert run_of(out) == "um_mae_vit" and verify(out)[0]
    make(out)
    assert run_of(out) == "mae" and verify(out)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]
    assert all((out / name).read_text() == "mine" for name in OTHERS)


def test_the_next_export_finishes_one_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it makes its own, which may fail."""
    out = clone(tmp_path / "hub")
    staging = tmp_path / ".hub.partial"
    staging.mkdir()
    shutil.copytree(make(tmp_path / "new", "um_mae_vit"), staging / "hub")
    (staging / publish.HALFWAY).touch()
    (out / "model.safetensors.tmp").write_text("a kill leaves these")
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match="transformers has no model"):
        make(out, "um_mae")
    assert run_of(out) == "um_mae_vit" and verify(out)[0] and not staging.exists()
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("target", ["empty", "none", "full"])
def test_a_link_to_a_folder_stays_one(target: str, tmp_path: Path) -> None:
    folder, link = tmp_path / "disk" / "real", tmp_path / "link"
    folder.parent.mkdir()
    if target == "empty":
        folder.mkdir()
    if target == "full":
        clone(folder)
    link.symlink_to(folder)
    assert make(link, "um_mae_vit") == link
    assert link.is_symlink() and run_of(folder) == "um_mae_vit" and verify(link)[0]
    assert "from_pretrained('link'" in (link / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    assert [path.name for path in folder.parent.iterdir()] == ["real"]
    assert target != "full" or (folder / "LICENSE").read_text() == "mine"


@pytest.mark.parametrize(
    ("names", "certificate", "part"),
    [
        (["certificate.json"], "{}", "no earlier export"),  # of something else
        (["certificate.json"], '{"exported": {"files": []}}', "no earlier export"),
        (["certificate.json", "config.json"], '{"exported": {"files": {"other": 1}}}', "no earlier export"),
        (["pytorch_model.bin"], None, "holds pytorch_model.bin, which a loader may take"),
    ],
)
def test_a_folder_with_what_is_not_the_exports_is_refused(
    names: list[str], certificate: str | None, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hub"
    if certificate is None:
        make(out)
    out.mkdir(exist_ok=True)
    for name in names:
        (out / name).write_text(certificate or "mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=part):
        make(out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert main(["verify-export", str(out)]) != 0
