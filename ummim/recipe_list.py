"""``ummim recipes``: the packaged recipes in a table, with what was published for them and what they cost."""

import json
from typing import Any

from ummim.recipe import Recipe
from ummim.recipe_file import PACKAGED, load_recipe, packaged_recipes

COSTS = PACKAGED / "costs.json"  # written by benchmarks/recipe_costs.py; counting takes seconds for each recipe
HEADER = ("recipe", "method", "backbone", "epochs", "r", "top-1", "G-MAC", "of full", "published by")
FOOTER = """\
r: throwing ratio. top-1: published accuracy on ImageNet-1K after fine-tuning; none of these was trained by us.
G-MAC: multiply-adds of a forward pass for one image, as `ummim cost` counts them; of full: beside throwing nothing."""
LETTERS = {
    "vit": ("ViT", {384: "S", 768: "B", 1024: "L", 1280: "H"}),
    "relative_vit": ("ViT", {384: "S", 768: "B", 1024: "L", 1280: "H"}),
    "swin": ("Swin", {96: "T", 128: "B", 192: "L"}),
    "um_swin": ("Swin", {96: "T", 128: "B", 192: "L"}),
    "pvt": ("PVT", {64: "S"}),
}


def backbone(recipe: Recipe) -> str:
    """The encoder's usual name, such as ViT-B/16; other sizes by their width, such as Swin-32."""
    encoder: Any = recipe.method.encoder  # type: ignore[attr-defined]
    family, letters = LETTERS[encoder.kind]
    width = encoder.embed_dims[0] if encoder.kind == "pvt" else encoder.embed_dim
    patch = f"/{encoder.patch_size}" if family == "ViT" else ""
    return f"{family}-{letters.get(width, width)}{patch}"


def recipe_table() -> str:
    """All packaged recipes, a line each."""
    costs, rows = json.loads(COSTS.read_text()), [HEADER]
    for name in packaged_recipes():
        recipe, cost = load_recipe(name), costs[name]
        top1, throws = recipe.published.top1, recipe.throw_ratio or recipe.method.attention
        rows.append(
            (
                name,
                type(recipe.method).__module__.rsplit(".", 1)[-1],
                backbone(recipe),
                str(recipe.epochs),
                f"{recipe.throw_ratio:.0%}" if recipe.throw_ratio else "",
                f"{top1:.2f}".removesuffix("0") if top1 else "",
                f"{cost['forward_gmac']:.2f}",
                f"{cost['of_full']:.0%}" if throws else "",
                recipe.published.source,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    numbers = range(3, 8)
    lines = [
        "  ".join(f"{cell:{'>' if i in numbers else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, FOOTER])
