"""A run that goes on with another recipe says in what."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY_MAE
from ummim.recipe_changes import changes
from ummim.recipe_file import dump_recipe, load_recipe


@pytest.mark.parametrize("resume", ["auto", "the run", "the step"])
def test_every_key_that_matters_is_told_with_both_values(write_recipe: Any, tmp_path: Path, resume: str) -> None:
    recipe = load_recipe(str(write_recipe(TINY_MAE)), [f"output={tmp_path / 'run'}"])
    step = tmp_path / "run" / "checkpoints" / "step-4"
    step.mkdir(parents=True)
    (step / "recipe.yaml").write_text(dump_recipe(recipe))
    places = {"auto": "auto", "the run": str(tmp_path / "run"), "the step": str(step)}
    output = recipe.output if resume == "auto" else "elsewhere"
    same = replace(recipe, resume=places[resume], output=output, data=replace(recipe.data, workers=7))
    assert changes(same, 4) == []
    other = replace(same, throw_ratio=0.5, partial=replace(recipe.partial, aggregation="none"))
    assert changes(other, 4) == ["throw_ratio: 0.0, now 0.5", "partial.aggregation: conv, now none"]


def test_a_checkpoint_without_a_recipe_tells_nothing(write_recipe: Any, tmp_path: Path) -> None:
    assert changes(load_recipe(str(write_recipe(TINY_MAE)), [f"output={tmp_path / 'run'}"]), 4) == []
