"""Train real methods under many strategies in one process group; rank 0 prints a JSON line of numbers per case.

Arguments: a folder for the runs, and a file with a JSON list of cases, each a list of a recipe file and ``key=value``
overrides. A line holds each step's ``losses`` and ``norms``, and the ``accumulation``. No checkpoint is written.
"""

import gc
import json
import sys
import traceback
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ummim.data import Batch
from ummim.engine import trainer, zero
from ummim.engine.metrics import FILE
from ummim.masking import sample_seed
from ummim.pretrain import Pretraining
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe
from ummim.run_plan import RunPlan


class NoCheckpoints:
    """In place of ``Saver``."""

    pending = False

    def __init__(self, *run: Any) -> None: ...

    def save(self, *state: Any) -> None: ...

    def advance(self, pending: int) -> None: ...

    def wait(self) -> None: ...


def batches(recipe: Recipe, plan: RunPlan, rank: int, done: int) -> Iterator[Batch]:
    """Pictures of smooth noise, laid out over steps, micro-batches and ranks as the loader does it.

    A sample and its mask are a pure function of its position, so that the same global batch can be cut otherwise.
    """
    sampler, size = recipe.sampler(), recipe.data.image_size
    for number in range(done * plan.accumulation, plan.stop_step * plan.accumulation):
        start = (number * plan.world_size + rank) * plan.micro_batch
        places = range(start, start + plan.micro_batch)
        keys = [f"sample-{place}" for place in places]
        masks = sampler.stack([sampler(sampler.seed(recipe.seed, 0, f"sample-{p}", p)) for p in places])
        images = torch.stack([picture(place, size) for place in places])
        yield Batch(images, masks, torch.zeros(plan.micro_batch, dtype=torch.int64), keys)


@lru_cache(maxsize=1024)
def picture(place: int, size: int) -> torch.Tensor:
    """(3, size, size) uint8. Contrasts differ from sample to sample, and so do losses."""
    generator = torch.Generator().manual_seed(sample_seed(0, 0, f"sample-{place}") >> 1)
    small = torch.rand(1, 3, 8, 8, generator=generator) * torch.rand(1, generator=generator)
    return torch.nn.functional.interpolate(small, size, mode="bilinear")[0].mul(255).byte()


def run(recipe: Recipe, world: zero.World) -> dict[str, Any]:
    """One case from its first step to its last; the numbers are rank 0's."""
    plan = recipe.plan(world.size, samples=20 * recipe.global_batch)
    torch.manual_seed(recipe.seed)
    method = recipe.method.build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)
    task = Pretraining(method)
    trainer.train(task, recipe, plan, world, "digest", lambda done: batches(recipe, plan, world.rank, done))
    if not world.is_main:
        return {}
    lines = [json.loads(line) for line in (Path(recipe.output) / FILE).read_text().splitlines()]
    losses, norms = [line["loss"] for line in lines], [line["grad_norm"] for line in lines]
    return {"losses": losses, "norms": norms, "accumulation": plan.accumulation}


def main() -> None:
    trainer.Saver = NoCheckpoints  # type: ignore[assignment, misc]
    world = zero.setup_distributed()
    gc.freeze()  # a million objects of the libraries, which each of DeepSpeed's collections would go through
    for number, (file, *overrides) in enumerate(json.loads(Path(sys.argv[2]).read_text())):
        recipe = load_recipe(file, [*overrides, f"output={sys.argv[1]}/{number}"])
        try:
            numbers = run(recipe, world)
        except BaseException:
            traceback.print_exc()
            raise
        if world.is_main:
            print(json.dumps(numbers), flush=True)
    zero.shutdown()


if __name__ == "__main__":
    main()
