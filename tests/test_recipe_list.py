"""The costs that ``ummim recipes`` shows are those that ``ummim cost`` counts."""

import json

import pytest

from ummim.catalogue import COSTS
from ummim.cost import report
from ummim.recipe_file import load_recipe, packaged_recipes


def test_every_recipe_has_its_cost() -> None:
    assert sorted(json.loads(COSTS.read_text())) == packaged_recipes()


@pytest.mark.parametrize("name", ["quickstart", "pr_simmim_vit_base_100e_r30", "amt_mae_vit_base_400e"])
def test_a_cost_is_what_is_counted_now(name: str) -> None:
    counted, stored = report(load_recipe(name)), json.loads(COSTS.read_text())[name]
    assert stored["forward_gmac"] == pytest.approx(counted["forward_flops"] / 2e9, abs=1e-4)
    assert stored["of_full"] == pytest.approx(counted["flops_ratio"], abs=1e-4)
