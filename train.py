"""The one entry point: ``python train.py RECIPE [key=value ...] [--dry-run]``, also under deepspeed and torchrun.

RECIPE is a packaged name (``ummim recipes``) or a YAML file. The same command again goes on where the last one
stopped. Exit codes: 0 done, 2 your mistake (one message), 1 ours, 143 after a clean preemption save.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ummim.errors import run_main
from ummim.recipe import Recipe
from ummim.recipe_file import dump_recipe, load_recipe


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(argv)
    logging.basicConfig(format="ummim: %(message)s", level=logging.WARNING)
    return run_main(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    if options.dry_run:
        from ummim.dry_run import dry_run

        print(dry_run(recipe, options.world_size or int(os.environ.get("WORLD_SIZE", 1))))
        return 0
    return pretrain(recipe)


def pretrain(recipe: Recipe) -> int:
    """Run ``recipe`` on this rank, to its end or an interruption; returns the exit code."""
    import torch

    from ummim.data import Batch, ShardIndex, build_loader, fixed_batch
    from ummim.engine.trainer import train
    from ummim.engine.zero import setup_distributed, shutdown
    from ummim.environment import write_environment
    from ummim.pretrain import Pretraining
    from ummim.reconstruct import draw_reconstruction

    world = setup_distributed()
    try:
        index = ShardIndex.open(recipe.data.shards)
        index.check()
        plan = recipe.plan(world.size, len(index))
        sampler = recipe.sampler()
        sampler.warm_up()
        torch.manual_seed(recipe.seed)  # the same weights on every rank
        method = recipe.method.build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)
        output = Path(recipe.output)

        def batches(done: int) -> Iterable[Batch]:
            if world.is_main:  # the run is ours from here on: a refused checkpoint has ended it before
                output.mkdir(parents=True, exist_ok=True)
                (output / "recipe.yaml").write_text(dump_recipe(recipe))
                write_environment(output, world.size, index.digest)
            return build_loader(index, recipe.data, sampler, recipe.seed, plan, world.rank, world.size, start_step=done)

        fixed = fixed_batch(index, recipe.data, sampler, recipe.seed, recipe.figure_images).to(world.device)

        def on_epoch_end(epoch: int) -> None:
            if recipe.figure_every and (epoch % recipe.figure_every == 0 or epoch == recipe.epochs):
                path = output / "reconstructions" / f"epoch-{epoch:04d}.png"
                draw_reconstruction(method, fixed, path if world.is_main else None, f"{recipe.name}, epoch {epoch}")

        return train(Pretraining(method), recipe, plan, world, index.digest, batches, on_epoch_end)
    finally:
        shutdown()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Pre-train a backbone by masked image modelling.")
    parser.add_argument("recipe", help="packaged recipe (see `ummim recipes`) or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.shards=/data zero_stage=3")
    parser.add_argument("--dry-run", action="store_true", help="check and print everything, train nothing")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks to plan for with --dry-run (default 1)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser


if __name__ == "__main__":
    sys.exit(main())
