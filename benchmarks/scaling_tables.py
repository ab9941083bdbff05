"""The tables of docs/scaling.md: two 800-epoch recipes on nodes of eight H100.

    python benchmarks/scaling_tables.py [--gpu H100] [--write docs/scaling.md]

A calculation, nothing is run: what `ummim capacity RECIPE --nodes N --gpu H100` says, for several N in one table.
``--write`` puts the tables between the file's two markers.
"""

import argparse
from pathlib import Path

from ummim.capacity.activations import KINDS, counted_as
from ummim.capacity.gpus import GPUS, Assumptions
from ummim.capacity.report import (
    Cluster,
    Model,
    checkpointing_of,
    largest_micro_batches,
    memory_of,
    recommended_every,
    run,
    step_of,
)
from ummim.capacity.strategy import GIB, STAGES
from ummim.recipe_file import load_recipe

RECIPES = ("um_mae_swin_large_800e", "mae_vit_large_800e")
NODES = (1, 4, 16, 64)
BEGIN, END = "<!-- tables: benchmarks/scaling_tables.py -->", "<!-- end of tables -->"
COLUMNS = [
    "nodes", "micro-batch x accumulated", "memory of a rank, GiB", "step, ms", "of it communication not hidden",
    "images/s", "per GPU, of 1 node's", "days", "GPU hours", "failures expected", "`checkpoint_every`",
]  # fmt: skip


def lines(cells: list[list[str]]) -> list[str]:
    """A Markdown table; the first row is its head."""
    rule = ["---:"] * len(cells[0])
    return ["| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:])]


def tables(name: str, gpu: str) -> list[str]:
    """Both tables of a recipe."""
    recipe = load_recipe(name)
    model = Model.of(recipe)
    rows, base = [COLUMNS], 0.0
    for nodes in NODES:
        cluster = Cluster(nodes, 8, GPUS[gpu], Assumptions())
        plan = recipe.plan(cluster.world_size, recipe.expected_samples)
        step, duration = step_of(model, plan, cluster), run(model, plan, step_of(model, plan, cluster), cluster, True)
        kind = counted_as(recipe.activation_checkpointing)
        memory = memory_of(model, plan, cluster, recipe.zero_stage, kind)
        base = base or step.images_per_second
        every = recommended_every(checkpointing_of(model, plan, cluster, True), step)
        rows.append([
            str(nodes), f"{plan.micro_batch} x {plan.accumulation}", f"{memory.total / GIB:.1f}",
            f"{step.total * 1e3:.0f}", f"{step.exposed * 1e3:.1f}", f"{step.images_per_second:,.0f}",
            f"{step.images_per_second / nodes / base:.0%}", f"{duration['days']:.2f}", f"{duration['gpu_hours']:,.0f}",
            f"{duration['expected_failures']:.3f}", f"{every:,}",
        ])  # fmt: skip
    cluster = Cluster(NODES[0], 8, GPUS[gpu], Assumptions())
    largest = largest_micro_batches(model, recipe.plan(8, recipe.expected_samples), cluster)
    fits = [["", *KINDS]] + [[f"ZeRO-{s}", *(str(largest[str(s)][kind]) for kind in KINDS)] for s in STAGES]
    head = (
        f"**`{name}`**, {recipe.precision}, ZeRO-{recipe.zero_stage}, activation_checkpointing="
        f"{recipe.activation_checkpointing}, {recipe.global_batch} images a step"
    )
    return [head, "", *lines(rows), "", "The largest micro-batch that fits one of 8 GPUs:", "", *lines(fits), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description="The tables of docs/scaling.md")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="H100")
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    text = "\n".join(line for name in RECIPES for line in tables(name, options.gpu)).strip()
    print(text)
    if options.write is not None:
        before, _, rest = options.write.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
