"""Folders for transformers: they load with from_pretrained, and what comes out is equal to 1e-5."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.interop.exports import CHECKPOINT, build, images_of, shaken, tiny
from ummim.__main__ import main
from ummim.backbones.table_swin import TableSwinConfig
from ummim.data.config import LabelledDataConfig
from ummim.data.normalise import normalise
from ummim.downstream.classify import build_classifier
from ummim.downstream.recipe import ClassifyConfig, ClassifyRecipe
from ummim.engine.checkpoint import seal
from ummim.errors import UserError
from ummim.interop.certificate import verify
from ummim.interop.export import export
from ummim.interop.huggingface import to_huggingface
from ummim.interop.load import load_init
from ummim.masking import MaskPlan
from ummim.methods import simmim
from ummim.nn.targets import patchify
from ummim.recipe_file import dump_recipe

transformers = pytest.importorskip("transformers", reason="pip install 'ummim[huggingface]'")

ENCODERS = {
    "mae": "ViTModel",
    "um_mae_vit": "ViTModel",
    "mff": "ViTModel",
    "tec": "ViTModel",
    "local_mim": "ViTModel",
    "simmim": "BeitModel",
    "amt_simmim": "BeitModel",
    "simmim_swin": "SwinModel",
    "green_mim": "SwinModel",
    "local_mim_swin": "SwinModel",
}


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def load(folder: Path, kind: str, **arguments: Any) -> Any:
    """As a user would, and nothing missing or left over."""
    assert json.loads((folder / "config.json").read_text())["architectures"] == [kind]
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_an_encoder_has_equal_features(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, method = tiny(name)
    path, line = export(recipe, method, CHECKPOINT, tmp_path / name, "huggingface", encoder_only=True)
    assert "equal" in line
    kind, encoder, images = ENCODERS[name], method.backbone(), images_of(recipe)
    load(path, kind, **({} if kind == "SwinModel" else {"add_pooling_layer": False}))
    (block,) = re.findall(r"```python\n(.*?)```", (path / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    held: dict[str, Any] = {}
    exec(block, held)  # as the card says: some norms need another eps
    expected = encoder(images)
    if name.startswith("local_mim"):  # without a final norm, so transformers' is fresh
        expected = F.layer_norm(expected, expected.shape[-1:], eps=1e-6)
    found = held["model"](images).last_hidden_state
    assert_equal(found, expected.reshape(found.shape))
    assert held["processor"](Image.new("RGB", (90, 70))).pixel_values[0].shape == images.shape[1:]


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize(("name", "throw"), [("mae", 0.0), ("mae", 0.5), ("amt", 0.0)])
@torch.no_grad()
def test_an_mae_has_the_same_loss_and_logits(name: str, throw: float, norm_pix: bool, tmp_path: Path) -> None:
    """For any noise, under the mask that transformers draws from it."""
    recipe, method = tiny(name, throw, norm_pix_loss=norm_pix)
    model = load(export(recipe, method, CHECKPOINT, tmp_path / "mae", "huggingface").path, "ViTMAEForPreTraining")
    images, tokens = images_of(recipe), method.grid[0] * method.grid[1]
    theirs = model(images, noise=torch.rand(2, tokens))
    masked = theirs.mask.bool()
    ours = method(images, MaskPlan.from_mask(masked))
    assert_equal(theirs.loss, ours.loss)
    assert_equal(theirs.logits[masked], ours.prediction[masked])
    hidden = 0.85 if name == "amt" else 0.75  # masked and thrown
    assert model.config.mask_ratio == pytest.approx(hidden)
    assert masked.sum() == 2 * (tokens - int(tokens * (1 - hidden)))


@torch.no_grad()
def test_simmim_on_swin_has_the_same_loss_and_reconstruction(tmp_path: Path) -> None:
    recipe, method = tiny("simmim_swin")
    path = export(recipe, method, CHECKPOINT, tmp_path / "swin", "huggingface").path
    model, images = load(path, "SwinForMaskedImageModeling"), images_of(recipe)
    mask = torch.rand(2, 16).argsort(1) < 9  # 9 of 4x4 units
    cells = mask.view(2, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2).flatten(1)
    theirs, ours = model(images, bool_masked_pos=cells), method(images, MaskPlan.from_mask(mask))
    assert_equal(theirs.loss, ours.loss)
    assert_equal(patchify(theirs.reconstruction, 32)[mask], ours.prediction[mask])


@pytest.mark.parametrize(
    ("name", "changes", "kind"),
    [
        ("simmim_swin", {"norm_pix_loss": True}, "SwinModel"),  # the class has no such loss
        ("mae", {"throw": 0.5, "fill": "all"}, "ViTModel"),  # predictions pass the aggregation
        ("um_mae_vit", {}, "ViTModel"),  # secondary masking
    ],
)
def test_what_no_class_can_compute_goes_as_an_encoder(name: str, changes: dict[str, Any], kind: str) -> None:
    _, method = tiny(name, **changes)
    assert to_huggingface(method, 0.75).architecture == kind


@pytest.mark.parametrize(
    ("name", "pool", "kind"),
    [
        ("mae", "mean", "BeitForImageClassification"),
        ("mae", "class", "ViTForImageClassification"),
        ("simmim", "mean", "BeitForImageClassification"),
        ("simmim", "class", "BeitForImageClassification"),
        ("simmim_swin", "mean", "SwinForImageClassification"),
        ("green_mim", "mean", "SwinForImageClassification"),
    ],
)
@torch.no_grad()
def test_a_classifier_has_equal_logits(name: str, pool: Any, kind: str, tmp_path: Path) -> None:
    recipe, method = tiny(name)
    classifier = shaken(build_classifier(method.backbone(), 5, pool))  # type: ignore[arg-type]
    classifier.head.weight.data.mul_(20)  # logits of about 1 and more
    evaluation = ClassifyRecipe(
        classify=ClassifyConfig(weights="w", classes=5, pool=pool, val_shards="v"),
        data=LabelledDataConfig(shards="nowhere", image_size=recipe.data.image_size),
        name="tuned",
    )
    path = export(evaluation, classifier, CHECKPOINT, tmp_path / "tuned", "huggingface").path
    model, images = load(path, kind), images_of(recipe)
    if name == "green_mim":
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
    assert_equal(model(images).logits, classifier(images))
    assert verify(path)[0]


@torch.no_grad()
def test_a_fine_tuned_run_is_exported_from_its_folder(tmp_path: Path) -> None:
    recipe, method = tiny("mae")
    config = ClassifyConfig(weights="w", encoder=method.encoder.config, classes=5, val_shards="v")  # type: ignore[arg-type]
    data = LabelledDataConfig(shards="nowhere", image_size=24)
    classifier = shaken(build_classifier(method.encoder, 5))  # type: ignore[arg-type]
    step = tmp_path / "run" / "checkpoints" / "step-7"
    step.mkdir(parents=True)
    save_file({f"model.{key}": value for key, value in classifier.state_dict().items()}, step / "model.safetensors")
    (step / "recipe.yaml").write_text(dump_recipe(ClassifyRecipe(classify=config, data=data, name="tuned")))
    seal(step)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "huggingface"]) == 0
    model, images = load(tmp_path / "out", "BeitForImageClassification"), images_of(recipe)
    assert_equal(model(images).logits, classifier(images))
    assert model.config.id2label == {label: str(label) for label in range(5)}


@pytest.mark.parametrize("name", ["um_mae", "um_mae_pvt", "simmim_um_swin", "simmim_pvt"])
def test_an_encoder_that_transformers_lacks_is_refused(name: str, tmp_path: Path) -> None:
    recipe, method = tiny(name)
    with pytest.raises(UserError, match=r"transformers has no model .*--format official .*--format safetensors"):
        export(recipe, method, CHECKPOINT, tmp_path / "out", "huggingface")
    assert not list(tmp_path.iterdir())


def test_swins_that_transformers_cannot_compute_are_refused(tmp_path: Path) -> None:
    wide = TableSwinConfig(8, (1, 1, 1, 1), (1, 2, 2, 4), window_size=4)
    with pytest.raises(UserError, match="2x2 tokens is smaller than the window of 4"):
        to_huggingface(simmim.SimMIM(64, simmim.Config(wide)), 0.6)
    _, legacy = tiny("local_mim_swin", legacy_coordinates=True)
    with pytest.raises(UserError, match="legacy_coordinates"):
        to_huggingface(legacy, 0.75)


@torch.no_grad()
def test_merges_by_rows_become_merges_by_columns(tmp_path: Path) -> None:
    """The check compares features; and back in a method that merges by rows, the weights are what they were."""
    recipe, method = tiny("green_mim", row_major_merge=True)
    path = export(recipe, method, CHECKPOINT, tmp_path / "green", "huggingface").path
    fresh = build(recipe)
    load_init(fresh, path)
    assert all(
        torch.equal(value, method.encoder.state_dict()[key]) for key, value in fresh.encoder.state_dict().items()
    )


def test_images_are_prepared_as_ours(tmp_path: Path) -> None:
    recipe, method = tiny("mae")
    path = export(recipe, method, CHECKPOINT, tmp_path / "mae", "huggingface").path
    processor = transformers.ViTImageProcessor.from_pretrained(path)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    found = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    assert_equal(found, normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None]))
    assert processor(Image.new("RGB", (70, 50)), return_tensors="pt").pixel_values.shape == (1, 3, 24, 24)


@pytest.mark.parametrize("name", ["mae", "simmim_swin"])
def test_what_transformers_saves_again_starts_a_run(name: str, tmp_path: Path) -> None:
    """Its own save_pretrained spells an MAE's decoder otherwise than the hub does."""
    recipe, method = tiny(name)
    path = export(recipe, method, CHECKPOINT, tmp_path / "first", "huggingface").path
    kind = json.loads((path / "config.json").read_text())["architectures"][0]
    load(path, kind).save_pretrained(tmp_path / "second")
    for folder in (path, tmp_path / "second"):
        fresh = build(recipe)
        report = load_init(fresh, folder)
        assert report.missing == () and report.left_over == ()
        assert all(torch.equal(value, method.state_dict()[key]) for key, value in fresh.state_dict().items())


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, method = tiny("mae")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"ummim\[huggingface\]"):
        export(recipe, method, CHECKPOINT, tmp_path / "mae", "huggingface")
    assert not list(tmp_path.iterdir())
