"""Encoders from a run, an exported file, and official files with and without a decoder, fine-tuned too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import TINY_MAE, TINY_UM_MAE
from tests.interop.official_cases import CASES, Case
from tests.interop.official_tensors import official_tensors
from tests.test_command_line import make_run
from ummim.__main__ import main
from ummim.downstream.adapt import for_whole_images, image_size_of
from ummim.downstream.encoders import build_classifier, describe, load_encoder
from ummim.downstream.recipe import ClassifyRecipe
from ummim.downstream.task import build_model, encoder_from_scratch
from ummim.downstream.trained import load_trained
from ummim.engine.checkpoint import seal
from ummim.errors import UserError
from ummim.interop import load_official, save_official
from ummim.interop.official import FAMILIES
from ummim.interop.run import load_run
from ummim.recipe_file import dump_recipe, load_recipe

FIRST = [next(case for case in CASES if case.family == family) for family in FAMILIES]
DECODERS = ("decoder", "mask_token", "neck.", "hog_enc")  # how official names begin that are not the encoder's


def same(encoder: Any, other: Any) -> bool:
    a, b = encoder.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


def official(case: Case, path: Path, encoder_only: bool) -> dict[str, Tensor]:
    tensors = official_tensors(case)
    if encoder_only:
        own = ("mask_token",) if case.family.startswith("um_simmim") else ()
        tensors = {key: value for key, value in tensors.items() if key in own or not key.startswith(DECODERS)}
    torch.save({"model": tensors}, path)
    return tensors


@pytest.mark.parametrize("text", [TINY_MAE, TINY_UM_MAE], ids=["mae", "um_mae"])
def test_from_a_run_and_from_what_it_exported(text: str, write_recipe, tmp_path: Path) -> None:
    run = make_run(write_recipe(text), tmp_path / "run")
    _, method, checkpoint = load_run(run)
    (checkpoint / "state.json").write_text(json.dumps({"step": 3}))
    encoder, told = load_encoder(run)
    assert same(encoder, for_whole_images(method.backbone()).encoder)  # type: ignore[arg-type]
    assert not encoder.training
    assert (told["source"], told["format"], told["recipe"], told["step"]) == (str(run), "run", "tiny", 3)
    assert len(told["sha256"]) == 64
    assert {"decoder.mask_token", "head.pred.weight"} <= set(told["left"])
    assert ("vis_mask_token" in told["left"]) == ("um_mae" in text)
    assert "tiny, step 3, from " in describe(told)
    assert "not used: " in describe(told)

    file = tmp_path / "encoder.safetensors"
    assert main(["export", str(run), str(file)]) == 0
    again, told = load_encoder(file, image_size=64)
    assert same(again, load_encoder(checkpoint, image_size=64)[0])
    assert image_size_of(again) == 64
    assert (told["format"], told["recipe"], told["step"]) == ("export", "tiny", None)
    assert bool(told["resized"]) == ("um_mae" not in text)  # 32 pixels before, and a position table


@pytest.mark.parametrize("case", FIRST, ids=lambda case: case.family)
@pytest.mark.parametrize("encoder_only", [False, True], ids=["whole", "encoder"])
def test_from_official_pre_trainings_with_a_decoder_and_without(case: Case, encoder_only: bool, tmp_path: Path) -> None:
    tensors = official(case, tmp_path / "official.pth", encoder_only)
    untold = {name: case.sizes[name] for name in case.untold if not name.startswith(("decoder", "norm_pix"))}
    encoder, told = load_encoder(tmp_path / "official.pth", case.family, **untold)
    whole: Any = load_official(case.family, official_tensors(case), **{name: case.sizes[name] for name in case.untold})
    assert same(encoder, for_whole_images(whole.encoder).encoder)
    images = torch.randn(1, 3, image_size_of(encoder), image_size_of(encoder))
    assert build_classifier(encoder, 5)(images).shape == (1, 5)
    left = [key for key in tensors if key in told["left"]]
    others = ("vis_mask_token", "encoder.mask_token", "norm.", "encoder.norm.", "backbone.proj_")  # LocalMIM's, MFF's
    assert all(key.startswith((*DECODERS, *others)) for key in left)
    assert set(left) >= {key for key in tensors if key.startswith(DECODERS)}
    assert (told["format"], told["recipe"]) == ("official", case.family)


def test_an_official_fine_tuned_file_and_its_head(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.family == "um_mae_swin")
    tensors = official(case, tmp_path / "x.pth", encoder_only=True)
    del tensors["vis_mask_token"], tensors["norm.weight"], tensors["norm.bias"]
    width = 8 * case.sizes["embed_dim"]
    head = {
        "fc_norm.weight": torch.ones(width),
        "fc_norm.bias": torch.zeros(width),
        "head.weight": torch.ones(7, width),
    }
    torch.save({"model": {**tensors, **head, "head.bias": torch.zeros(7)}}, tmp_path / "tuned.pth")
    encoder, told = load_encoder(tmp_path / "tuned.pth", "um_mae_swin", img_size=64, window_size=8)
    assert encoder.config.window_size == 8  # type: ignore[union-attr]  # it has seen whole images already
    assert told["left"] == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    with pytest.raises(UserError, match="tuned.pth: the checkpoint is no fine-tuned simmim_vit of these sizes"):
        load_encoder(tmp_path / "tuned.pth", "simmim_vit")


FINE_TUNED = """
classify:
  encoder: {kind: vit, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}
  classes: 5
  val_shards: nowhere
data: {shards: nowhere, image_size: 32}
"""


def fine_tuned_run(write_recipe: Any, folder: Path, change: str = "") -> tuple[Path, Any]:
    """A fine-tuning's folder with a checkpoint of random weights, and the model."""
    recipe = load_recipe(str(write_recipe(FINE_TUNED.replace("classes:", change + "classes:"))), (), ClassifyRecipe)
    model = build_model(recipe, encoder_from_scratch(recipe))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    checkpoint = folder / "checkpoints" / "step-7"
    checkpoint.mkdir(parents=True)
    save_file({f"model.{key}": value for key, value in model.state_dict().items()}, checkpoint / "model.safetensors")
    (checkpoint / "recipe.yaml").write_text(dump_recipe(recipe))
    seal(checkpoint)
    return folder, model.eval()


@pytest.mark.parametrize("protocol", ["full", "linear"])
def test_from_a_fine_tuning_and_a_probe(protocol: str, write_recipe, tmp_path: Path) -> None:
    run, model = fine_tuned_run(write_recipe, tmp_path / "run", f"protocol: {protocol}\n  ")
    recipe, again, checkpoint = load_trained(run)
    images = torch.randn(2, 3, 32, 32)
    assert again(images).equal(model(images))
    assert (recipe.classify.protocol, checkpoint.name) == (protocol, "step-7")
    encoder, told = load_encoder(run)
    own = model.encoder if protocol == "full" else model.backbone.encoder
    assert same(encoder, own)
    assert any(key.startswith("head.") for key in told["left"])
    assert not any("encoder." in key for key in told["left"])


def test_what_no_fine_tuning_left_behind_is_refused(write_recipe, tmp_path: Path) -> None:
    pre_training = make_run(write_recipe(TINY_MAE), tmp_path / "pre")
    with pytest.raises(UserError, match="pre-training"):
        load_trained(pre_training)
    run, _ = fine_tuned_run(write_recipe, tmp_path / "run")
    checkpoint = run / "checkpoints" / "step-7"
    save_file({"model.head.bias": torch.zeros(5)}, checkpoint / "model.safetensors")
    seal(checkpoint)
    with pytest.raises(UserError, match="step-7: the weights do not fit .*head.weight"):
        load_trained(run)
    (checkpoint / "recipe.yaml").unlink()
    seal(checkpoint)
    with pytest.raises(UserError, match="has no recipe.yaml"):
        load_trained(run)


def test_a_key_too_many_or_too_few_in_the_encoder_is_named(tmp_path: Path) -> None:
    case = FIRST[0]
    tensors = official(case, tmp_path / "a.pth", encoder_only=True)
    for change, message in (
        ({"blocks.0.attn.rel_pos": torch.zeros(3)}, "left-over keys: blocks.0.attn.rel_pos"),
        ({"norm.weight": torch.zeros(7)}, r"mis-shaped keys: norm.weight \(7,\) instead of \(24,\)"),
        ({"blocks.1.mlp.fc1.bias": None}, "missing keys: blocks.1.mlp.fc1.bias"),
    ):
        changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        torch.save({"model": changed}, tmp_path / "b.pth")
        with pytest.raises(UserError, match=f"b.pth: the checkpoint is no {case.family}'s encoder.*{message}"):
            load_encoder(tmp_path / "b.pth", case.family, num_heads=3)


def test_mistakes_are_one_message(write_recipe, tmp_path: Path) -> None:
    run = make_run(write_recipe(TINY_MAE), tmp_path / "run")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "old.safetensors", {"ummim_recipe": "{}"})
    torch.save({"model": save_official(load_run(run)[1], "mae_vit")}, tmp_path / "mae.pth")
    for arguments, options, message in (
        (("nowhere",), {}, "nowhere: no such file or folder"),
        ((tmp_path,), {}, "no recipe|folder"),
        ((tmp_path / "mae.pth",), {}, "read as a timm ViT: .*left-over keys: mask_token.*of an official file, name"),
        ((run, "mae_vit"), {}, "family = 'mae_vit' is for official files"),
        ((run,), {"num_heads": 3}, "num_heads: sizes go with the family"),
        ((run,), {"image_size": 30}, "run: data.image_size, for images of 30 pixels: .* patch size 8"),
        ((tmp_path / "junk.pth",), {}, "junk.pth cannot be read as a checkpoint"),
        ((tmp_path / "junk.pth", "mae_vit"), {}, "junk.pth: .*cannot be read"),
        ((tmp_path / "mae.pth", "mae"), {}, "family = 'mae' is not supported; supported are: mae_vit"),
        ((tmp_path / "mae.pth", "simmim_vit"), {}, "no simmim_vit's encoder.*missing keys"),
        ((tmp_path / "mae.pth", "mae_vit"), {"windows": 3}, "mae_vit has no size windows"),
        ((tmp_path / "plain.safetensors",), {}, "neither of ummim export nor .*name the family: one of mae_vit"),
        ((tmp_path / "old.safetensors",), {}, "hold no recipe of this version"),
    ):
        with pytest.raises(UserError, match=message):
            load_encoder(*arguments, **options)  # type: ignore[arg-type]


def test_an_exported_file_of_other_tensors_is_refused(write_recipe, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    assert main(["export", str(make_run(write_recipe(TINY_MAE), tmp_path / "run")), str(file)]) == 0
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    del tensors["cls_token"]
    save_file(tensors, tmp_path / "b.safetensors", metadata)
    with pytest.raises(UserError, match=r"b.safetensors: the tensors do not fit its recipe: missing keys: cls_token"):
        load_encoder(tmp_path / "b.safetensors")
