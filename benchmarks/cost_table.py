"""The table of docs/cost.md: what the packaged recipes cost, with and without partial reconstruction.

    python benchmarks/cost_table.py [RECIPE ...] [--write docs/cost.md]

Prints the table in Markdown, a row for each recipe's model at throwing ratio 0 and 50%; ``--write`` puts it between
the file's two markers. Nothing is timed and no data is read: `ummim cost` counts on the meta device.
"""

import argparse
from pathlib import Path
from typing import Any

from ummim.cost import report
from ummim.errors import RecipeError
from ummim.recipe_file import load_recipe

# A recipe for each model, and the G multiply-adds of the papers' own codes at throwing ratio 0 and 50%, where known:
# MAE's by counting, the others' by formulas of the same kind. TEC's hold 17.563 for the teacher.
MODELS: dict[str, tuple[float | None, float | None]] = {
    "mae_vit_base_800e": (9.781, 7.082),
    "mae_vit_large_800e": (20.756, 18.057),
    "simmim_vit_base_800e": (17.679, 8.828),
    "simmim_swin_tiny_200e": (None, None),
    "simmim_swin_base_800e": (None, None),
    "simmim_swin_large_800e": (None, None),
    "um_mae_vit_base_200e": (None, None),
    "um_mae_swin_tiny_200e": (3.363, 2.463),
    "um_mae_swin_base_200e": (None, None),
    "um_mae_swin_large_800e": (18.457, 14.839),
    "um_mae_pvt_small_200e": (None, None),
    "um_simmim_swin_tiny_200e": (None, None),
    "um_simmim_pvt_small_200e": (None, None),
    "green_mim_swin_base_200e": (None, None),
    "green_mim_swin_large_800e": (None, None),
    "local_mim_vit_base_1600e": (5.234, 4.876),
    "local_mim_vit_large_800e": (None, None),
    "local_mim_swin_base_400e": (None, None),
    "mff_vit_base_800e": (9.929, 7.230),
    "amt_mae_vit_base_400e": (None, None),
    "amt_simmim_vit_base_200e": (None, None),
    "tec_vit_base_300e": (25.865, 24.436),
}
BEGIN, END = "<!-- table: benchmarks/cost_table.py -->", "<!-- end of table -->"
HEADER = [
    "Recipe", "r", "Parameters, M", "Forward, G multiply-adds", "of full", "papers' codes", "Training, GFLOPs",
    "Activations, MiB: fused", "of full", "materialised", "of full",
]  # fmt: skip


def row(values: dict[str, Any], official: float | None) -> str:
    """One line of the table."""
    full, mib = values["baseline"], 2**20
    thrown = values["forward_flops"] != full["forward_flops"]

    def share(key: str) -> str:
        return f"{values[key] / full[key]:.1%}" if thrown else ""

    cells = [
        values["recipe"],
        f"{values['throw_ratio']:.0%}",
        f"{values['parameters'] / 1e6:.2f}",
        f"{values['forward_flops'] / 2e9:.3f}",
        share("forward_flops"),
        "" if official is None else f"{official:.3f}",
        f"{values['training_flops'] / 1e9:.2f}",
        f"{values['activation_bytes_fused'] / mib:.1f}",
        share("activation_bytes_fused"),
        f"{values['activation_bytes_materialised'] / mib:.1f}",
        share("activation_bytes_materialised"),
    ]
    return "| " + " | ".join(cells) + " |"


def rows(name: str) -> list[str]:
    """The lines of one recipe; only the first where the method knows no partial reconstruction."""
    full, half = MODELS.get(name, (None, None))
    lines = [row(report(load_recipe(name, ["throw_ratio=0"])), full)]
    try:
        partial = load_recipe(name, ["throw_ratio=0.5"])
    except RecipeError:
        return lines
    return [*lines, row(report(partial), half)]


def write(path: Path, table: str) -> None:
    """Put the table between the file's markers."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(MODELS), metavar="RECIPE")
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    header = ["| " + " | ".join(HEADER) + " |", "| --- " + "| ---: " * (len(HEADER) - 1) + "|"]
    table = "\n".join([*header, *(line for name in options.recipes for line in rows(name))])
    print(table)
    if options.write:
        write(options.write, table)


if __name__ == "__main__":
    main()
