"""Sizes that no tensor of an official file tells: its certificate's, a published model's, or an error."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop.exports import CHECKPOINT, build, images_of, shaken, tiny
from ummim.backbones.pvt import PVTConfig
from ummim.backbones.swin import SwinConfig
from ummim.backbones.vit import ViTConfig
from ummim.data.config import LabelledDataConfig
from ummim.downstream.adapt import for_whole_images
from ummim.downstream.encoders import load_encoder
from ummim.downstream.recipe import ClassifyConfig, ClassifyRecipe
from ummim.downstream.run import starting_encoder
from ummim.errors import UserError
from ummim.interop.certificate import certificate_path
from ummim.interop.export import export
from ummim.interop.load import load_init
from ummim.interop.official import family_of, save_official

NAMES = ("mae", "um_mae", "um_mae_pvt", "green_mim", "mff", "simmim", "simmim_swin", "local_mim", "local_mim_swin")


def official(name: str, path: Path, **method: Any) -> tuple[Any, Any, str]:
    """An exported official file: its recipe, model and family."""
    recipe, model = tiny(name, **method)
    export(recipe, model, CHECKPOINT, path, "official")
    return recipe, model, family_of(model) or ""


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_file_comes_back_with_the_models_own_features(name: str, tmp_path: Path) -> None:
    others: dict[str, Any] = {"um_mae": {"window_size": 4}, "um_mae_pvt": {"sr_ratios": (2, 2, 1, 1)}}  # no default
    sizes = replace(tiny(name)[0].method.encoder, **others.get(name, {}))  # type: ignore[attr-defined]
    recipe, model, family = official(name, tmp_path / "a.pth", encoder=sizes)
    encoder, _ = load_encoder(tmp_path / "a.pth", family)
    expected: Any = for_whole_images(model.encoder).encoder.eval()
    assert encoder.config == expected.config
    images = images_of(recipe)
    with torch.no_grad():
        assert encoder(images).equal(expected(images))


@pytest.mark.parametrize("name", ["local_mim", "mff"])
def test_taps_are_no_part_of_an_encoder(name: str, tmp_path: Path) -> None:
    deep = replace(tiny(name)[0].method.encoder, depth=6)  # type: ignore[attr-defined]
    taps = {"local_mim": (0, 1, 4, 5), "mff": (0, 3, 5)}[name]
    _, model, family = official(name, tmp_path / "a.pth", encoder=deep, taps=taps)
    certificate_path(tmp_path / "a.pth").unlink()
    encoder, _ = load_encoder(tmp_path / "a.pth", family, num_heads=deep.num_heads)
    assert encoder.config == model.encoder.config


@pytest.mark.parametrize(
    ("name", "size"), [("mae", "num_heads"), ("um_mae", "window_size"), ("um_mae_pvt", "num_heads")]
)
def test_a_guess_is_refused(name: str, size: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    _, model, family = official(name, path)
    certificate = certificate_path(path)
    text = certificate.read_text()
    certificate.unlink()
    value = getattr(model.encoder.config, size)
    assert load_encoder(path, family, **{size: value})[0].config.num_heads == model.encoder.config.num_heads
    for other in (None, text.replace('"sha256": "', '"sha256": "0'), "[]", json.dumps({"exported": 3})):
        if other is not None:  # of another file, or none
            certificate.write_text(other)
        with pytest.raises(UserError, match=rf"a\.pth: nothing tells {size}, and .* would be a guess") as error:
            load_encoder(path, family)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["mae", "um_mae_pvt"])
def test_a_recipe_states_the_heads_of_a_file_without_certificate(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    pretraining, model, family = official(name, path)
    certificate_path(path).unlink()
    config = for_whole_images(model.encoder).encoder.config
    classify = ClassifyConfig(str(path), family, encoder=config, classes=3, val_shards="nowhere")
    data = LabelledDataConfig("nowhere", image_size=pretraining.data.image_size)
    recipe = ClassifyRecipe(name="a", output=str(tmp_path / "run"), classify=classify, data=data)
    assert starting_encoder(recipe)[0].config == config
    with pytest.raises(UserError, match=r"state num_heads: classify\.encoder in a recipe or load_encoder"):
        starting_encoder(replace(recipe, classify=replace(classify, encoder=None)))


def test_a_given_size_that_is_not_the_certificates_is_refused(tmp_path: Path) -> None:
    official("mae", tmp_path / "a.pth")
    assert load_encoder(tmp_path / "a.pth", "mae_vit", num_heads=3)[0].config.num_heads == 3
    with pytest.raises(
        UserError, match=r"a.pth: num_heads = 2, but a.pth.certificate.json says 3: leave num_heads out"
    ):
        load_encoder(tmp_path / "a.pth", "mae_vit", num_heads=2)


@pytest.mark.parametrize(
    ("name", "config", "size"),
    [
        ("mae", ViTConfig(embed_dim=384, depth=1, num_heads=6), 64),
        ("um_mae", SwinConfig(depths=(1, 1, 1, 1)), 256),
        ("um_mae_pvt", PVTConfig(depths=(1, 1, 1, 1)), 128),
    ],
)
def test_published_sizes_need_no_telling(name: str, config: Any, size: int, tmp_path: Path) -> None:
    recipe, _ = tiny(name, encoder=config)
    model: Any = build(replace(recipe, data=replace(recipe.data, image_size=size)))
    family = family_of(model) or ""
    torch.save({"model": save_official(model, family)}, tmp_path / "a.pth")
    expected: Any = for_whole_images(model.encoder).encoder
    assert load_encoder(tmp_path / "a.pth", family)[0].config == expected.config


def test_a_damaged_certificate_is_named(tmp_path: Path) -> None:
    official("mae", tmp_path / "a.pth")
    path = certificate_path(tmp_path / "a.pth")
    stated = json.loads(path.read_text())
    for value in ("three", None, [], {"a": 1}, [[1]], -3):
        stated["exported"]["arguments"]["num_heads"] = value
        path.write_text(json.dumps(stated))
        with pytest.raises(UserError, match=r"a.pth.certificate.json: is damaged: num_heads = .*; export again"):
            load_encoder(tmp_path / "a.pth", "mae_vit")


def test_a_start_takes_the_certificates_sizes_not_the_recipes(tmp_path: Path) -> None:
    recipe, model, _ = official("mae", tmp_path / "a.pth")
    method: Any = recipe.method
    for part in ("encoder", "decoder"):
        heads = getattr(method, part).num_heads
        other = replace(method, **{part: replace(getattr(method, part), num_heads=1)})
        message = (
            rf"a.pth: method.{part}.num_heads is {heads} in official mae_vit and 1 in this recipe: set it to {heads}"
        )
        with pytest.raises(UserError, match=message):
            load_init(build(replace(recipe, method=other)), tmp_path / "a.pth", "mae_vit")
    fresh = shaken(build(recipe), 3)
    assert not load_init(fresh, tmp_path / "a.pth", "mae_vit").missing
    assert all(value.equal(model.state_dict()[key]) for key, value in fresh.state_dict().items())
