"""Count a pass of every packaged recipe, for `ummim recipes`.

    python benchmarks/recipe_costs.py [--check] [--new]

Writes ummim/recipes/costs.json; ``--check`` only says whether it is up to date, ``--new`` counts only recipes that are
not in it. Recipes whose model, mask and throwing ratio are the same are counted once.
"""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from ummim.atomic import write_text
from ummim.capacity.activations import counted_as, measure
from ummim.capacity.evaluations import measure as measure_evaluation
from ummim.capacity.strategy import Shapes
from ummim.catalogue import COSTS
from ummim.cost import batch_of, build_on_meta, count_flops, full_reconstruction, meta_inputs
from ummim.downstream.recipe import ClassifyRecipe
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe, packaged_evaluations, packaged_recipes


def main() -> None:
    parser = argparse.ArgumentParser(description="Multiply-adds of every packaged recipe")
    parser.add_argument("--check", action="store_true", help="exit 1 if the file is out of date, and write nothing")
    parser.add_argument("--new", action="store_true", help="count only what is not in the file")
    options = parser.parse_args()
    known: dict[str, Any] = {}
    before = json.loads(COSTS.read_text())
    costs = {}
    for name in packaged_recipes():
        recipe = load_recipe(name)
        if options.new and name in before:
            costs[name] = before[name]
            continue
        mine = forward(recipe, True, known)
        full = forward(full_reconstruction(recipe), False, known)
        costs[name] = {"forward_gmac": round(mine, 4), "of_full": round(mine / full, 4), "step": step(recipe, known)}
        print(name, costs[name], flush=True)
    for name in packaged_evaluations():
        costs[name] = before[name] if options.new and name in before else evaluation(name, known)
    if options.check:
        sys.exit(0 if before == costs else f"{COSTS} is out of date: run {sys.argv[0]}")
    rows = [f' "{name}": {json.dumps(cost)}' for name, cost in costs.items()]
    write_text(COSTS, "{\n" + ",\n".join(rows) + "\n}\n")


def forward(recipe: Recipe, attention: bool, known: dict[str, Any]) -> float:
    """G multiply-adds for an image."""
    key = same(recipe, attention)
    if key not in known:
        inputs = meta_inputs(recipe, attention)
        flops, _ = count_flops(build_on_meta(recipe), *inputs)
        known[key] = flops / len(inputs[0]) / 2e9
    value: float = known[key]
    return value


def step(recipe: Recipe, known: dict[str, Any]) -> dict[str, Any]:
    """What the time of a step depends on, see ``catalogue.on_cluster``."""
    if recipe.zero_stage == 3:
        sys.exit(f"{recipe.name}: at ZeRO-3 time depends on every parameter's size, not on their sums alone")
    kind = counted_as(recipe.activation_checkpointing)
    key = same(recipe, kind, batch_of(recipe))
    if key not in known:
        shapes = Shapes.of(build_on_meta(recipe))
        known[key] = {
            "groups": [sum(group) for group in shapes.groups],
            "frozen": sum(shapes.frozen),
            "buffers": shapes.buffers,
            "activations": asdict(measure(recipe, kind)),
        }
    value: dict[str, Any] = known[key]
    return value


def evaluation(name: str, known: dict[str, Any]) -> dict[str, Any]:
    """The costs of an evaluation."""
    recipe = load_recipe(name, (), ClassifyRecipe)
    if recipe.zero_stage == 3 or recipe.activation_checkpointing != "none":
        sys.exit(f"{name}: ZeRO-3 and activation checkpointing are not counted of evaluations")
    key = repr([recipe.classify, recipe.data.image_size, recipe.micro_batch, recipe.precision])
    if key not in known:
        known[key] = measure_evaluation(recipe)
        print(name, known[key], flush=True)
    step: dict[str, Any] = known[key]
    return {"forward_gmac": round(step["activations"]["forward_flops"] / 2e9, 4), "step": step}


def same(recipe: Recipe, *more: Any) -> str:
    """Equal for recipes that compute the same."""
    return repr([recipe.method, recipe.data.image_size, recipe.mask, recipe.throw_ratio, recipe.partial, *more])


if __name__ == "__main__":
    main()
