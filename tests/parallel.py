"""Train real methods under many strategies in one process group; rank 0 prints a JSON line of losses per case.

Arguments: a folder for the runs, and a JSON list of cases, each a list of a recipe file and ``key=value`` overrides.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ummim.data import Batch
from ummim.engine import zero
from ummim.engine.metrics import FILE
from ummim.engine.trainer import train
from ummim.masking import sample_seed
from ummim.pretrain import Pretraining
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe
from ummim.run_plan import RunPlan


def batches(recipe: Recipe, plan: RunPlan, rank: int, done: int) -> Iterator[Batch]:
    """Pictures of smooth noise, a pure function of (step, micro-batch, rank)."""
    sampler, size = recipe.sampler(), recipe.data.image_size
    for step in range(done, plan.stop_step):
        for micro in range(plan.accumulation):
            keys = [f"{step}-{micro}-{rank}-{i}" for i in range(plan.micro_batch)]
            generator = torch.Generator().manual_seed(sample_seed(0, 0, keys[0]) >> 1)
            small = torch.rand(plan.micro_batch, 3, 8, 8, generator=generator)
            images = torch.nn.functional.interpolate(small, size, mode="bilinear").mul(255).byte()
            masks = sampler.stack([sampler(sample_seed(0, 0, key)) for key in keys])
            yield Batch(images, masks, torch.zeros(plan.micro_batch, dtype=torch.int64), keys)


def main() -> None:
    world = zero.setup_distributed()
    for number, (file, *overrides) in enumerate(json.loads(sys.argv[2])):
        output = Path(sys.argv[1]) / str(number)
        recipe = load_recipe(file, [*overrides, f"output={output}"])
        plan = recipe.plan(world.size, samples=10 * recipe.global_batch)
        torch.manual_seed(recipe.seed)
        method = recipe.method.build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)

        def build(done: int, recipe: Recipe = recipe, plan: RunPlan = plan) -> Iterator[Batch]:
            return batches(recipe, plan, world.rank, done)

        train(Pretraining(method), recipe, plan, world, "digest", build)
        if world.is_main:
            lines = [json.loads(line) for line in (output / FILE).read_text().splitlines()]
            print(json.dumps([line["loss"] for line in lines]), flush=True)
    zero.shutdown()


if __name__ == "__main__":
    main()
