"""Count the forward pass of every packaged recipe, for `ummim recipes`.

    python benchmarks/recipe_costs.py [--check]

Writes ummim/recipes/costs.json; ``--check`` only says whether it is up to date. Recipes whose model, mask and throwing
ratio are the same are counted once.
"""

import argparse
import json
import sys
from typing import Any

from ummim.atomic import write_text
from ummim.cost import build_on_meta, count_flops, full_reconstruction, meta_inputs
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe, packaged_recipes
from ummim.recipe_list import COSTS


def main() -> None:
    parser = argparse.ArgumentParser(description="Multiply-adds of every packaged recipe")
    parser.add_argument("--check", action="store_true", help="exit 1 if the file is out of date, and write nothing")
    options = parser.parse_args()
    known: dict[str, float] = {}
    costs = {}
    for name in packaged_recipes():
        recipe = load_recipe(name)
        mine = forward(recipe, True, known)
        full = forward(full_reconstruction(recipe), False, known)
        costs[name] = {"forward_gmac": round(mine, 4), "of_full": round(mine / full, 4)}
        print(name, costs[name], flush=True)
    if options.check:
        sys.exit(0 if json.loads(COSTS.read_text()) == costs else f"{COSTS} is out of date: run {sys.argv[0]}")
    write_text(COSTS, json.dumps(costs, indent=1) + "\n")


def forward(recipe: Recipe, attention: bool, known: dict[str, float]) -> float:
    """G multiply-adds for an image."""
    parts: list[Any] = [recipe.method, recipe.data.image_size, recipe.mask, recipe.throw_ratio, recipe.partial]
    key = repr([*parts, attention])
    if key not in known:
        inputs = meta_inputs(recipe, attention)
        flops, _ = count_flops(build_on_meta(recipe), *inputs)
        known[key] = flops / len(inputs[0]) / 2e9
    return known[key]


if __name__ == "__main__":
    main()
