"""Weights of another architecture are no start, though their tensors may fit: one message with key, values and fix."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TINY_MAE, TINY_UM_MAE
from tests.interop.exports import CHECKPOINT, build, images_of, shaken, tiny
from tests.test_command_line import make_run
from ummim.backbones.relative_vit import RelativeViTConfig
from ummim.data.config import LabelledDataConfig
from ummim.downstream.adapt import for_whole_images
from ummim.downstream.classify import build_classifier
from ummim.downstream.recipe import ClassifyConfig, ClassifyRecipe
from ummim.errors import UserError
from ummim.interop.export import export
from ummim.interop.load import load_init
from ummim.interop.official import save_official
from ummim.interop.run import load_run
from ummim.interop.source import Source
from ummim.recipe import Recipe
from ummim.run_config import RunConfig


def exported(recipe: RunConfig, method: Any, folder: Path, form: str = "safetensors") -> Path:
    name = "hub" if form == "huggingface" else "a.safetensors"
    return export(recipe, method, CHECKPOINT, folder / name, form).path


def tuned(recipe: Recipe, encoder: Any) -> ClassifyRecipe:
    """The recipe of a fine-tuning."""
    classify = ClassifyConfig(encoder=encoder.config, classes=5, val_shards="v")
    return ClassifyRecipe(classify=classify, data=LabelledDataConfig("s", image_size=recipe.data.image_size))


def changed(recipe: Recipe, part: str, **sizes: Any) -> Any:
    """A fresh model of the recipe with other sizes of its encoder or decoder."""
    method: Any = recipe.method
    return build(replace(recipe, method=replace(method, **{part: replace(getattr(method, part), **sizes)})))


def refused(method: Any, path: Path, message: str) -> None:
    before = {key: value.clone() for key, value in method.state_dict().items()}
    with pytest.raises(UserError, match=message) as error:
        load_init(method, path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert all(value.equal(before[key]) for key, value in method.state_dict().items())


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("mae", {"num_heads": 4}, "method.encoder.num_heads is 3 in .* and 4 in this recipe: set it to 3, or start"),
        ("mff", {"depth": 4}, "method.encoder.depth is 3 in .* and 4 in this recipe: set it to 3"),
        ("local_mim_swin", {"depths": (1, 1, 1, 1)}, r"method.encoder.depths is \[2, 1, 1, 1\] .* \[1, 1, 1, 1\] in"),
        ("um_mae", {"window_size": 2}, "method.encoder.window_size is 8 in .* and 2 in this recipe: set it to 8"),
        ("um_mae", {"num_heads": (1, 2, 2, 8)}, r"num_heads is \[1, 2, 2, 4\] in .* and \[1, 2, 2, 8\] in this"),
        ("um_mae_pvt", {"sr_ratios": (2, 2, 1, 1)}, r"sr_ratios is \[4, 2, 1, 1\] in .* and \[2, 2, 1, 1\] in this"),
        ("simmim", {"absolute_position": True, "relative_position": False}, "no place for: encoder.rel_pos_bias.rela"),
    ],
)
def test_an_encoder_of_other_sizes(name: str, sizes: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe, method = tiny(name)
    options = {"taps": (0, 3)} if name == "mff" else {}
    other = replace(recipe, method=replace(recipe.method, **options))
    refused(changed(other, "encoder", **sizes), exported(recipe, method, tmp_path), message)


def test_fewer_blocks_than_the_weights_have(tmp_path: Path) -> None:
    recipe, method = tiny("mff")
    other, _ = tiny("mae", encoder=replace(recipe.method.encoder, depth=2))  # type: ignore[attr-defined]
    refused(build(other), exported(recipe, method, tmp_path), "method.encoder.depth is 3 in .* and 2 in this recipe")


def test_an_encoder_of_another_kind(tmp_path: Path) -> None:
    """SimMIM's ViT has most of the names of MAE's, but neither its biases nor its positions."""
    sizes = tiny("mae")[0].method.encoder  # type: ignore[attr-defined]
    relative = RelativeViTConfig(sizes.patch_size, sizes.embed_dim, sizes.depth, sizes.num_heads, drop_path=0.0)
    recipe, method = tiny("simmim", encoder=relative)
    message = "method.encoder.kind is relative_vit in exported encoder and vit in this recipe: take a recipe with such"
    refused(tiny("mae")[1], exported(recipe, method, tmp_path), message)


def test_a_runs_decoder_of_other_heads(write_recipe: Any, tmp_path: Path) -> None:
    run = make_run(write_recipe(TINY_MAE), tmp_path / "run")
    recipe, method, _ = load_run(run)
    heads = recipe.method.decoder.num_heads  # type: ignore[attr-defined]
    other = changed(recipe, "decoder", num_heads=2 * heads)
    message = f"method.decoder.num_heads is {heads} in run step-3 and {2 * heads} in this recipe: set it to {heads}, or"
    refused(other, run, message)
    assert load_init(other, exported(recipe, method, tmp_path)).used  # the encoder alone
    swin = make_run(write_recipe(TINY_UM_MAE), tmp_path / "swin")
    refused(build(recipe), swin, r"swin: method.encoder.kind is um_swin in run step-3 and vit in this recipe")


def test_a_folder_of_transformers_with_a_decoder_of_other_heads(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="pip install 'ummim[huggingface]'")
    recipe, method = tiny("mae")
    folder = exported(recipe, method, tmp_path, "huggingface")
    refused(changed(recipe, "decoder", num_heads=2), folder, "decoder.num_heads is 4 in transformers' ViTMAE.* and 2")


def test_heads_that_a_timm_file_does_not_tell_are_the_recipes(tmp_path: Path) -> None:
    recipe, method = tiny("mae")
    path = exported(recipe, method, tmp_path, "timm")
    refused(changed(recipe, "encoder", num_heads=4), path, "method.encoder.num_heads is 3 in timm ViT and 4 in this")
    save_file(load_file(path), tmp_path / "bare.safetensors")
    assert load_init(changed(recipe, "encoder", num_heads=4), tmp_path / "bare.safetensors").used


@pytest.mark.parametrize("name", ["um_mae", "um_mae_pvt", "green_mim", "simmim_swin", "mae"])
def test_a_fine_tuned_encoder_starts_the_pre_training_that_it_came_from(name: str, tmp_path: Path) -> None:
    """On whole images a pyramid's windows are twice as wide, and it pools over twice the side."""
    recipe, method = tiny(name)
    encoder: Any = for_whole_images(method.backbone()).encoder  # type: ignore[arg-type]
    path = exported(tuned(recipe, encoder), shaken(build_classifier(encoder, 5)), tmp_path)
    report = load_init(build(recipe), path)
    assert not [key for key in report.left_over if key.startswith("encoder.")]


@pytest.mark.parametrize(("name", "family"), [("um_mae", "um_mae_swin"), ("um_mae_pvt", "um_mae_pvt")])
def test_an_official_fine_tuned_pyramid_tells_no_windows(name: str, family: str, tmp_path: Path) -> None:
    recipe, method = tiny(name)
    tensors = save_official(method, family)
    width = len(tensors["norm.weight"])
    head = {"fc_norm.weight": torch.ones(width), "fc_norm.bias": torch.zeros(width),
            "head.weight": torch.ones(5, width), "head.bias": torch.zeros(5)}  # fmt: skip
    outside = ("decoder", "mask_token", "vis_mask_token", "norm.")
    torch.save({"model": {k: v for k, v in tensors.items() if not k.startswith(outside)} | head}, tmp_path / "a.pth")
    assert load_init(build(recipe), tmp_path / "a.pth", family).left_over == tuple(head)


def test_windows_may_be_those_of_larger_images(tmp_path: Path) -> None:
    recipe, method = tiny("simmim_um_swin")
    path = exported(recipe, method, tmp_path)
    for window in (4, 8):  # the same, or grown with the images
        larger = replace(recipe, data=replace(recipe.data, image_size=128))
        assert load_init(changed(larger, "encoder", window_size=window), path).used
    refused(changed(larger, "encoder", window_size=2), path, "method.encoder.window_size is 4 in .* and 2 in this")


def test_tecs_class_token_is_what_its_mlp_makes_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, method = tiny("tec")
    sizes = recipe.method.encoder  # type: ignore[attr-defined]
    plain: Any = build(replace(tiny("mae", encoder=sizes)[0], data=recipe.data)).eval()
    encoder: Any = method.encoder  # as of a run; an exported one's has passed it
    source = Source("run", "run step-3", "tec", encoder, {}, [], 3, tmp_path)
    monkeypatch.setattr("ummim.interop.load.read_source", lambda *arguments, **options: source)
    assert load_init(plain, tmp_path).left_over == ()
    with torch.no_grad():
        torch.testing.assert_close(plain.encoder(images_of(recipe)), method.encoder(images_of(recipe)))


@pytest.mark.parametrize("trained", [False, True])
def test_tables_of_every_block(trained: bool, tmp_path: Path) -> None:
    """A probe's are all the pre-training's one; a fine-tuning's are not, and have no place."""
    recipe, method = tiny("simmim")
    encoder: Any = for_whole_images(method.backbone()).encoder  # type: ignore[arg-type]
    model = build_classifier(encoder, 5).eval()
    path = exported(tuned(recipe, encoder), shaken(model) if trained else model, tmp_path)
    fresh: Any = build(recipe)
    if trained:
        refused(fresh, path, r"no place for: encoder.blocks.0.rel_pos_bias.relative_position_bias_table, encoder.bl")
        return
    load_init(fresh, path)
    table = fresh.encoder.rel_pos_bias.relative_position_bias_table
    assert table.equal(method.encoder.rel_pos_bias.relative_position_bias_table)  # type: ignore[union-attr]
