"""Weights to start from: every format of ours and of others into a recipe's model, or one clear message."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TINY_MAE
from tests.interop.exports import CHECKPOINT, build, tiny
from tests.test_command_line import make_run
from ummim.errors import UserError
from ummim.interop.certificate import certificate_path
from ummim.interop.export import export
from ummim.interop.load import load_init
from ummim.interop.run import load_run
from ummim.methods.api import Method


def differing(one: Method, other: Method, keys: Any) -> list[str]:
    return [key for key in keys if not torch.equal(one.state_dict()[key], other.state_dict()[key])]


@pytest.mark.parametrize(
    "name", ["mae", "um_mae", "um_mae_pvt", "green_mim", "mff", "simmim", "simmim_swin", "local_mim"]
)
def test_an_exported_encoder_comes_back(name: str, tmp_path: Path) -> None:
    recipe, method = tiny(name)
    path = export(recipe, method, CHECKPOINT, tmp_path / "a.safetensors", "safetensors").path
    fresh = build(recipe)
    report = load_init(fresh, path)
    assert set(report.used) == {key for key in method.state_dict() if key.startswith("encoder.")}
    assert differing(fresh, method, report.used) == []
    assert not report.left_over
    assert set(report.missing) == set(method.state_dict()) - set(report.used)


@pytest.mark.parametrize(
    "name", ["mae", "um_mae", "um_mae_pvt", "green_mim", "mff", "simmim", "simmim_swin", "local_mim"]
)
def test_an_official_file_comes_back_whole(name: str, tmp_path: Path) -> None:
    recipe, method = tiny(name)
    path = export(recipe, method, CHECKPOINT, tmp_path / "a.pth", "official").path
    family = {"um_mae": "um_mae_swin", "um_mae_pvt": "um_mae_pvt", "green_mim": "green_mim_swin",
              "simmim_swin": "simmim_swin"}.get(name, f"{name}_vit")  # fmt: skip
    fresh = build(recipe)
    report = load_init(fresh, path, family)
    assert (report.missing, report.left_over) == ((), ())
    assert differing(fresh, method, method.state_dict()) == []


@pytest.mark.parametrize("name", ["mae", "simmim", "green_mim"])
def test_a_timm_file_comes_back_and_its_head_is_left_over(name: str, tmp_path: Path) -> None:
    recipe, method = tiny(name)
    path = export(recipe, method, CHECKPOINT, tmp_path / "a.safetensors", "timm").path
    tensors = {**load_file(path), "head.fc.weight": torch.zeros(5, 24)}
    torch.save({"state_dict": tensors}, tmp_path / "timm.pth")
    for file, left in ((path, ()), (tmp_path / "timm.pth", ("head.fc.weight",))):
        fresh = build(recipe)
        report = load_init(fresh, file)
        assert report.left_over == left
        assert differing(fresh, method, report.used) == []
        assert {key for key in report.missing if key.startswith("encoder.")} <= {"encoder.mask_token"}


def test_a_run_starts_another_with_its_decoder(write_recipe: Any, tmp_path: Path) -> None:
    run = make_run(write_recipe(TINY_MAE), tmp_path / "run")
    recipe, method, _ = load_run(run)
    fresh = build(recipe)
    for path in (run, run / "checkpoints" / "step-3"):
        report = load_init(fresh, path)
        assert differing(fresh, method, method.state_dict()) == [] and report.missing == ()
    assert report.line().startswith(f"{len(method.state_dict())} tensors of run step-3 of ")


def test_merges_are_turned_to_the_recipes_order(tmp_path: Path) -> None:
    """Merges by rows and by columns hold the same weights in another order."""
    recipe, method = tiny("green_mim", row_major_merge=True)
    path = export(recipe, method, CHECKPOINT, tmp_path / "a.safetensors", "safetensors").path
    by_columns, _ = tiny("green_mim")
    fresh = build(by_columns)
    load_init(fresh, path)
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval().encoder(images), method.encoder(images))


def test_an_official_local_mim_is_by_rows_but_not_where_its_certificate_says_otherwise(tmp_path: Path) -> None:
    recipe, method = tiny("local_mim_swin")
    path = export(recipe, method, CHECKPOINT, tmp_path / "a.pth", "official").path
    fresh = build(recipe)
    load_init(fresh, path, "local_mim_swin")
    assert differing(fresh, method, method.state_dict()) == []
    certificate_path(path).unlink()  # as of the official code
    load_init(fresh, path, "local_mim_swin")
    assert "encoder.layers.1.downsample.reduction.weight" in differing(fresh, method, method.state_dict())


def test_a_teacher_is_left_alone_and_a_plain_class_token_does_not_pass_its_mlp(tmp_path: Path) -> None:
    recipe, method = tiny("tec")
    path = export(recipe, method, CHECKPOINT, tmp_path / "a.safetensors", "safetensors").path
    fresh = build(recipe)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    report = load_init(fresh, path)
    assert not any(key.startswith("teacher.") for key in (*report.used, *report.missing))
    assert report.left_over == ("encoder.cls_token",)
    assert torch.equal(fresh.state_dict()["encoder.cls_token"], before["encoder.cls_token"])
    assert differing(fresh, method, report.used) == []


def test_an_encoder_of_another_method_starts_this_one(tmp_path: Path) -> None:
    recipe, method = tiny("mff")
    path = export(recipe, method, CHECKPOINT, tmp_path / "a.safetensors", "safetensors").path
    other, _ = tiny("mae", encoder=recipe.method.encoder)  # type: ignore[attr-defined]
    fresh = build(other)
    report = load_init(fresh, path)
    assert torch.equal(fresh.encoder.state_dict()["blocks.2.mlp.fc1.weight"], method.encoder.blocks[2].mlp.fc1.weight)  # type: ignore[union-attr, index]
    assert "fresh, as it has none of them: 20 (embed.weight, " in report.line()
    assert report.line().endswith("left over there: none")


def test_a_misfit_names_the_key_and_both_shapes(tmp_path: Path) -> None:
    recipe, method = tiny("mae")
    path = export(recipe, method, CHECKPOINT, tmp_path / "a.safetensors", "safetensors").path
    before = {key: value.clone() for key, value in method.state_dict().items()}
    tensors = load_file(path)
    tensors["blocks.0.mlp.fc1.bias"] = torch.zeros(7)
    save_file(tensors, tmp_path / "misfit.safetensors")
    with pytest.raises(UserError, match=r"misfit.*mis-shaped keys: blocks.0.mlp.fc1.bias \(7,\) instead of \(96,\)"):
        load_init(method, tmp_path / "misfit.safetensors")
    wider, _ = tiny("mae", encoder=replace(recipe.method.encoder, mlp_ratio=2.0))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"blocks.0.mlp.fc1.weight is \(96, 24\) there and \(48, 24\) in this"):
        load_init(build(wider), path)
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())  # nothing was copied


def test_what_cannot_be_a_start_is_one_message(tmp_path: Path) -> None:
    recipe, method = tiny("mae")
    swin_recipe, swin = tiny("green_mim")
    path = export(swin_recipe, swin, CHECKPOINT, tmp_path / "swin.safetensors", "safetensors").path
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "text.pth").write_text("no checkpoint")
    save_file({"a": torch.ones(1)}, tmp_path / "strange.safetensors")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for file, family, part in (
        (path, None, "method.encoder.kind is swin in exported encoder and vit in this recipe: take a recipe with such"),
        (path, "nonsense", "family = 'nonsense' is not supported; supported are: mae_vit"),
        (tmp_path / "nowhere.pth", None, "no such file or folder"),
        (tmp_path / "junk.safetensors", None, "cannot be read as safetensors"),
        (tmp_path / "text.pth", None, "cannot be read as a checkpoint"),
        (tmp_path / "strange.safetensors", None, "it holds a); of an official file, name the family"),
        (tmp_path / "bert", None, "model_type = 'bert': can be read are vit_mae, vit, beit, swin"),
        (tmp_path / "broken", None, "is no JSON"),
        (tmp_path / "empty", None, "give a run's folder"),
    ):
        with pytest.raises(UserError) as error:
            load_init(method, file, family)
        assert part in str(error.value) and str(file if family is None else family) in str(error.value)
