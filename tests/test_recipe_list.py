"""The costs that ``ummim recipes`` shows are those that ``ummim cost`` counts."""

import json

import pytest

from ummim.capacity.evaluations import measure
from ummim.catalogue import COSTS
from ummim.cost import report
from ummim.downstream.recipe import ClassifyRecipe
from ummim.recipe_file import load_recipe, packaged_evaluations, packaged_recipes

pytestmark = pytest.mark.usefixtures("plain_linear")


def test_every_recipe_has_its_cost() -> None:
    assert sorted(json.loads(COSTS.read_text())) == sorted([*packaged_recipes(), *packaged_evaluations()])


@pytest.mark.parametrize("name", ["quickstart", "pr_simmim_vit_base_100e_r30", "amt_mae_vit_base_400e"])
def test_a_cost_is_what_is_counted_now(name: str) -> None:
    counted, stored = report(load_recipe(name)), json.loads(COSTS.read_text())[name]
    assert stored["forward_gmac"] == pytest.approx(counted["forward_flops"] / 2e9, abs=1e-4)
    assert stored["of_full"] == pytest.approx(counted["flops_ratio"], abs=1e-4)


@pytest.mark.parametrize("name", ["finetune_um_mae_pvt_small_200e", "linear_mae_vit_base_800e", "knn_probe"])
def test_an_evaluations_cost_is_what_is_counted_now(name: str) -> None:
    counted, stored = measure(load_recipe(name, (), ClassifyRecipe)), json.loads(COSTS.read_text())[name]
    assert stored["step"] == counted
    assert stored["forward_gmac"] == pytest.approx(counted["activations"]["forward_flops"] / 2e9, abs=1e-4)


def test_the_backward_pass_is_counted_as_far_down_as_something_is_trained() -> None:
    """ViT-B/16 in its ratio to the forward pass; the published 17.58 G-MAC of it hold the patch embedding, too."""
    words = ["classify.protocol=partial", "classify.last_blocks=4", "micro_batch=2"]
    ratios = {}
    for last, overrides in {"all": ["micro_batch=2"], "4": words}.items():
        found = measure(load_recipe("finetune_mae_vit_base_800e", overrides, ClassifyRecipe))["activations"]
        assert found["forward_flops"] / 2e9 == pytest.approx(17.58, rel=2e-3)
        ratios[last] = found["flops"] / found["forward_flops"]
    assert 2.98 < ratios["all"] < 3  # the images have no gradient
    assert ratios["4"] == pytest.approx(1 + 2 * 4 / 12, abs=0.02)
