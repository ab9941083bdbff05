"""``ummim export``: what it writes agrees with the model, is certified and described, or is not there."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.interop.exports import images_of, tiny
from ummim.__main__ import main
from ummim.errors import UserError
from ummim.interop import export as export_module
from ummim.interop.certificate import certificate_path, hashes, verify
from ummim.interop.check import compare, fixed_images, fixed_mask
from ummim.interop.export import ExportFailed, export
from ummim.run_config import Published

NAMES = {"safetensors": "encoder.safetensors", "timm": "timm.safetensors", "official": "mae.pth"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The step folder of a run with the files that an export reads."""
    step = tmp_path / "run" / "checkpoints" / "step-3"
    step.mkdir(parents=True)
    (step / "state.json").write_text(json.dumps({"step": 3, "samples": 24, "epoch": 1.5, "index_digest": "ab" * 32}))
    environment = {"git_commit": "c0ffee", "shard_digest": "ab" * 32, "packages": {"torch": "2"}}
    (tmp_path / "run" / "environment.json").write_text(json.dumps(environment))
    return step


@pytest.fixture(params=NAMES)
def exported(request: pytest.FixtureRequest, run: Path, tmp_path: Path) -> Path:
    recipe, method = tiny("mae")
    return export(recipe, method, run, tmp_path / "out" / NAMES[request.param], request.param).path


def certificate(path: Path) -> Any:
    return json.loads(certificate_path(path).read_text())


def test_a_certificate_says_where_it_comes_from_and_how_far_it_agrees(exported: Path) -> None:
    stated = certificate(exported)
    assert stated["exported"]["files"] == hashes(exported)
    assert stated["check"]["passed"] is True
    assert stated["check"]["max_abs_difference"] <= stated["check"]["tolerance"] == 1e-5
    assert stated["recipe"]["method"]["encoder"]["embed_dim"] == stated["encoder"]["embed_dim"] == 24
    source = {"run": "mae", "step": 3, "images_seen": 24, "data_digest": "ab" * 32, "git_commit": "c0ffee"}
    assert {key: stated["source"][key] for key in source} == source
    assert stated["made_with"]["packages"]["timm"]
    assert sorted(path.name for path in exported.parent.iterdir()) == sorted(
        [exported.name, f"{exported.name}.certificate.json", f"{exported.name}.md"]
    )
    assert exported.stat().st_mode & 0o444 == 0o444


def test_a_certificate_is_verified_from_the_file_alone(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify-export", str(exported)]) == 0
    assert "equal" in capsys.readouterr().out
    moved = exported.rename(exported.with_name("moved" + exported.suffix))
    assert main(["verify-export", str(moved)]) == 2
    assert "no certificate there" in capsys.readouterr().err
    certificate_path(exported).rename(certificate_path(moved))
    holds, lines = verify(moved)  # under another name it is another file
    assert not holds and "missing" in lines[0]
    for text in ("{}", "[1]", "no JSON", '{"certificate": 1, "exported": {}}', '{"certificate": 2}'):
        certificate_path(moved).write_text(text)
        assert main(["verify-export", str(moved)]) == 2


def test_a_changed_file_is_found(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(exported.read_bytes())
    data[-40] ^= 1
    exported.write_bytes(data)
    assert main(["verify-export", str(exported)]) == 1
    out = capsys.readouterr().out
    assert "changed" in out and "does NOT hold" in out


def test_weights_that_compute_something_else_are_found_though_the_hash_fits(run: Path, tmp_path: Path) -> None:
    recipe, method = tiny("mae")
    path = export(recipe, method, run, tmp_path / "a.safetensors", "safetensors").path
    tensors = load_file(path)
    tensors["blocks.0.mlp.fc1.bias"][0] += 0.01
    stated = certificate(path)
    save_file(tensors, path, {"format": "pt", "ummim_recipe": json.dumps(stated["recipe"])})
    stated["exported"]["files"] = hashes(path)
    certificate_path(path).write_text(json.dumps(stated))
    holds, lines = verify(path)
    assert not holds and "NOT equal" in lines[-1]


def test_numbers_that_do_not_agree_leave_no_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, method = tiny("mae")

    def wrong(encoder: Any, path: Path) -> None:
        export_module_write(encoder, path)
        with torch.no_grad():
            encoder.norm.bias[0] += 1e-3  # the model is now another one than the file's

    export_module_write = export_module.write_timm
    monkeypatch.setattr(export_module, "write_timm", wrong)
    with pytest.raises(ExportFailed, match="was not written.*NOT equal"):
        export(recipe, method, run, tmp_path / "out" / "a.safetensors", "timm")
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.setattr("ummim.downstream.trained.load_any", lambda path: (recipe, method, run))
    assert main(["export", str(run), str(tmp_path / "out" / "a.safetensors"), "--format", "timm"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("ummim: error: ") and "Traceback" not in printed
    assert list((tmp_path / "out").iterdir()) == []


def test_values_that_are_no_numbers_do_not_agree() -> None:
    ours = {"features": torch.ones(2, 3)}
    assert compare({"features": torch.ones(2, 3)}, ours)["passed"]
    assert not compare({"features": torch.full((2, 3), float("nan"))}, ours)["passed"]
    assert not compare({"features": torch.ones(3, 2)}, ours)["passed"]
    small = {"logits": torch.full((2, 3), 1e-3)}
    assert not compare({"logits": small["logits"] + 1e-6}, small)["passed"]  # small values are compared as closely


@pytest.mark.parametrize("form", NAMES)
def test_an_earlier_export_is_replaced_whole(form: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / NAMES[form]
    for name in ("mae", "um_mae_vit"):
        recipe, method = tiny(name)
        export(recipe, method, run, out, form)
    assert certificate(out)["source"]["run"] == "um_mae_vit"
    assert verify(out)[0]


@pytest.mark.parametrize(
    ("name", "form", "part"),
    [
        ("", "huggingface", "name the file or folder"),
        ("a.pth", "safetensors", "end its name in .safetensors"),
        ("a", "timm", "end its name in .safetensors"),
        ("a.safetensors", "official", "end its name in .pth"),
        ("folder", "official", "is a folder"),
        ("file", "huggingface", "is a file"),
        ("folder", "huggingface", "holds other files"),
    ],
)
def test_a_target_that_is_something_else_is_refused(name: str, form: str, part: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    recipe, method = tiny("mae")
    with pytest.raises(UserError, match=re.escape(part)):
        export(recipe, method, run, tmp_path / name if name else Path(), form)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_choice_of_a_model_goes_with_huggingface_only(run: Path, tmp_path: Path) -> None:
    recipe, method = tiny("mae")
    with pytest.raises(UserError, match="goes with --format huggingface"):
        export(recipe, method, run, tmp_path / "a.safetensors", "timm", encoder_only=True)


@pytest.mark.parametrize(
    ("name", "form"),
    [("mae", "safetensors"), ("mae", "timm"), ("mae", "official"), ("green_mim", "timm"),
     ("um_mae_pvt", "official"), ("mff", "official"), ("simmim", "timm")],
)  # fmt: skip
@torch.no_grad()
def test_the_cards_code_loads_the_model(
    name: str, form: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, method = tiny(name)
    path = export(recipe, method, run, tmp_path / NAMES[form], form).path
    card = path.with_name(f"{path.name}.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    held: dict[str, Any] = {}
    exec(block, held)
    model, images = held["model"], images_of(recipe)
    if form == "timm":
        found, expected = model.forward_features(images), method.backbone()(images)
    else:
        encoder = model.encoder if form == "official" else model
        found, expected = encoder(images), method.encoder(images)
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


def test_a_card_tells_data_and_results_and_keeps_the_published_apart(run: Path, tmp_path: Path) -> None:
    recipe, method = tiny("mae")
    recipe = replace(recipe, published=Published(83.6, "MAE, table 3"), description="a | b\nc")
    path = export(recipe, method, run, tmp_path / "a.safetensors", "safetensors").path
    card = path.with_name("a.safetensors.md").read_text()
    assert "Measured on these weights: nothing" in card
    assert "digest abababababab" in card and "24 images seen" in card
    assert re.search(r"not measured on these weights: 83\.6 % .*\(MAE, table 3\)", card)
    assert "Not stated" in card.partition("## Licence")[2]
    (tmp_path / "run" / "evaluation.json").write_text(
        json.dumps({"step": 3, "top1": 71.2345, "n": 500, "val_shards": "/home/me"})
    )
    export(recipe, method, run, path, "safetensors")
    measured, _, published = path.with_name("a.safetensors.md").read_text().partition("Published for this recipe")
    assert "Measured on these weights (" in measured and "| top1 | 71.23 |" in measured
    assert "83.6" not in measured and "83.6" in published and "/home/me" not in measured
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"step": 2, "top1": 70.0}))
    export(recipe, method, run, path, "safetensors")
    assert "Measured on other weights of the run" in path.with_name("a.safetensors.md").read_text()


def test_fixed_images_and_masks_are_the_same_everywhere() -> None:
    images = fixed_images(8)
    assert images.shape == (2, 3, 8, 8)
    expected = [math.sin(1e-3 * place**2) for place in (0, 1, 100, 383)]
    assert images.flatten()[[0, 1, 100, 383]].tolist() == pytest.approx(expected, abs=1e-7)
    assert not torch.equal(images[0], images[1])
    mask = fixed_mask(16, 4)
    assert mask.sum(1).tolist() == [12, 12]
    assert not torch.equal(mask[0], mask[1])
