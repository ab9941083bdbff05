"""The one entry point: ``python train.py RECIPE [key=value ...] [--dry-run]``, also under deepspeed and torchrun.

RECIPE pre-trains (a ``method`` section) or evaluates (``classify``): fine-tuning, probes, nearest neighbours. It
is a packaged name (``ummim recipes``) or a YAML file. The same command again goes on where the last one
stopped. Exit codes: 0 done, 2 your mistake (one message), 1 ours, 130 (Ctrl-C) and 143 (SIGTERM, SIGUSR1) after a save.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ummim.atomic import write_text
from ummim.downstream.recipe import ClassifyRecipe
from ummim.engine.faults import EXIT_INTERRUPT
from ummim.errors import EXIT_USER, RecipeError, run_main
from ummim.recipe import Recipe
from ummim.recipe_changes import tell_changes
from ummim.recipe_file import dump_recipe, load_recipe
from ummim.run_config import RunConfig
from ummim.run_plan import RunPlan

if TYPE_CHECKING:
    from ummim.engine.zero import World
    from ummim.methods.api import Method

log = logging.getLogger("ummim.train")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(argv)
    logging.basicConfig(format="ummim: %(message)s", level=logging.WARNING)
    try:
        return run_main(lambda: _run(options))
    except KeyboardInterrupt:  # before there was anything to save
        return EXIT_INTERRUPT
    finally:
        if "torch" in sys.modules:  # gloo's threads drop their last tensors: too late, it would abort (pytorch#179291)
            time.sleep(0.2)


def _run(options: argparse.Namespace) -> int:
    try:
        recipe = load_recipe(options.recipe, options.overrides, RunConfig)
    except RecipeError:
        if os.environ.get("RANK", "0") == "0":
            raise
        return EXIT_USER  # rank 0 says it
    if options.dry_run:
        from ummim.dry_run import dry_run

        print(dry_run(recipe, options.world_size or int(os.environ.get("WORLD_SIZE", 1))))
        return 0
    return run(recipe)


def run(recipe: RunConfig) -> int:
    """Run ``recipe`` on this rank, to its end or an interruption; returns the exit code."""
    from ummim.engine.watchdog import Watchdog
    from ummim.engine.zero import setup_distributed, shutdown

    world = setup_distributed()
    with Watchdog(recipe, world) as watchdog:
        if isinstance(recipe, Recipe):
            code = pretrain(recipe, world, watchdog.beat)
        else:
            from ummim.downstream.run import classify

            assert isinstance(recipe, ClassifyRecipe)
            code = classify(recipe, world, watchdog.beat)
    shutdown()  # not after an error: it would wait for ranks that are gone
    return code


def pretrain(recipe: Recipe, world: "World", beat: Callable[[int, str], None]) -> int:
    """Pre-train on this rank, to the end or an interruption; returns the exit code."""
    import torch

    from ummim.attention_maps import attention_batches
    from ummim.data import Batch, ShardIndex, build_loader
    from ummim.engine.faults import on_every_rank, on_main
    from ummim.engine.resume import lock
    from ummim.engine.trainer import train
    from ummim.engine.zero import deepspeed_config
    from ummim.environment import write_environment
    from ummim.epoch_end import EpochEnd
    from ummim.pretrain import Pretraining

    output = Path(recipe.output)

    def prepare() -> tuple[ShardIndex, RunPlan]:
        index = ShardIndex.open(recipe.data.shards, recipe.data.shard_cache())
        index.check()
        plan = recipe.plan(world.size, len(index))
        deepspeed_config(recipe, plan)
        lock(output)
        return index, plan

    index, plan = on_main(prepare, world)  # one rank asks the file system, and one message tells what is wrong
    sampler = recipe.sampler()
    sampler.warm_up()
    torch.manual_seed(recipe.seed)  # the same weights on every rank
    size, throwing = recipe.data.image_size, recipe.throw_ratio > 0
    method = on_every_rank(lambda: recipe.method.build(size, recipe.partial, throwing), world)  # may read a teacher
    load_start(recipe, method, world)
    if recipe.compile:
        method.compile(dynamic=False)
    at_end = EpochEnd(recipe, plan, method, index, sampler, world, beat)

    def batches(done: int) -> Iterable[Batch]:
        if world.is_main:  # the run is ours from here on: a refused checkpoint has ended it before
            tell_changes(recipe, done)
            write_text(output / "recipe.yaml", dump_recipe(recipe))
            write_environment(output, world.size, world.device, index.digest)
        if recipe.method.attention is not None:
            return attention_batches(method, index, recipe, plan, world, done)
        loader = build_loader(index, recipe.data, sampler, recipe.seed, plan, world.rank, world.size, done)
        loader.pin_memory = world.device.type == "cuda"
        return loader

    return train(Pretraining(method), recipe, plan, world, index.digest, batches, at_end, beat)


def load_start(recipe: Recipe, method: "Method", world: "World") -> None:
    """Copy the weights of ``recipe.init``, if it names any and the run does not go on from a checkpoint."""
    from ummim.engine.checkpoint import FOLDER, steps
    from ummim.engine.faults import on_every_rank, on_main
    from ummim.interop.load import load_init

    def afresh() -> bool:
        return recipe.resume == "never" or (recipe.resume == "auto" and not steps(Path(recipe.output) / FOLDER))

    if recipe.init and on_main(afresh, world):
        report = on_every_rank(lambda: load_init(method, recipe.init, recipe.init_family), world)
        if world.is_main:
            log.warning("init: %s", report.line())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Pre-train a backbone by masked image modelling, or evaluate one.")
    parser.add_argument("recipe", help="packaged recipe (see `ummim recipes`) or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.shards=/data zero_stage=3")
    parser.add_argument("--dry-run", action="store_true", help="check and print everything, train nothing")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks to plan for with --dry-run (default 1)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser


if __name__ == "__main__":
    sys.exit(main())
