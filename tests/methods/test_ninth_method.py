"""A ninth method is one file and one recipe, and gets the rest of the system for nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY_MAE
from tests.methods import ninth
from ummim.__main__ import main
from ummim.backbones.vit import ViTConfig
from ummim.masking import MaskPlan
from ummim.methods import mae
from ummim.nn.aggregation import PartialConfig
from ummim.nn.decoder import DecoderConfig
from ummim.recipe_file import load_recipe

RECIPE = TINY_MAE.replace("name: mae", "name: tests.methods.ninth\n  radius: 6") + "throw_ratio: 0.5\n"
SIZES = (ViTConfig(8, 32, 2, 2), DecoderConfig(32, 1, 2))


def test_it_is_short() -> None:
    assert len(Path(ninth.__file__).read_text().splitlines()) < 60


def test_a_recipe_names_it_and_its_own_key(write_recipe) -> None:
    recipe = load_recipe(str(write_recipe(RECIPE)))
    assert recipe.method == ninth.Config(*SIZES, radius=6)


def test_the_target_loses_its_high_frequencies_only() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    mask = torch.rand(2, 16).argsort(1) < 12
    plan = MaskPlan.from_mask(mask)
    whole = ninth.Config(*SIZES, radius=100).build(32, PartialConfig(), False)
    plain = mae.Config(*SIZES).build(32, PartialConfig(), False)
    plain.load_state_dict(whole.state_dict())
    torch.testing.assert_close(whole(images, plan).loss, plain(images, plan).loss)
    half = replace(ninth.Config(*SIZES), radius=4).build(32, PartialConfig(), False)
    spectrum = torch.fft.fft2(half.low_pass(images)).abs()
    assert spectrum[..., 4, 0].min() > 1e-3
    assert spectrum[..., 5, 0].max() < 1e-3


def test_cost_counts_it(write_recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", str(write_recipe(RECIPE)), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["flops_ratio"] < 1
