"""What a checkpoint costs the training loop: ours, waited for or beside training, and DeepSpeed's own.

    python benchmarks/checkpoint.py [--recipe mae_vit_base_800e] [--ranks 2] [--zero-stage 2] [--out FILE.json]

Each round takes the same steps once without a checkpoint and once with each kind of it, saved after the first step:

    blocked    seconds that the loop stands still for the save
    extra      seconds that the round takes longer than the one without, until the last step: what writing beside
               training slows down is in it (on a CPU the writer and the model share the cores)
    steps      after how many further steps the checkpoint was in place

All medians over the rounds. DeepSpeed's neither checks nor flushes what it writes; ours hashes and fsyncs every file.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from ummim.data import Batch
from ummim.engine import zero
from ummim.engine.bad_steps import LossMean
from ummim.engine.checkpoint_saver import Saver
from ummim.engine.faults import agree
from ummim.masking import sample_seed
from ummim.pretrain import Pretraining
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe
from ummim.run_plan import RunPlan

KINDS = ("none", "waited for", "beside training", "DeepSpeed's")


def main() -> None:
    parser = argparse.ArgumentParser(description="What a checkpoint costs the training loop.")
    parser.add_argument("--recipe", default="mae_vit_base_800e")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--images", type=int, default=1, help="per rank and step")
    parser.add_argument("--steps", type=int, default=6, help="in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the checkpoints go; a temporary folder unless given")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options)
        return
    with TemporaryDirectory(dir=options.folder) as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command = [*launcher, str(options.ranks), __file__, *sys.argv[1:], "--child", "--folder", folder]
        path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
        raise SystemExit(subprocess.run(command, env=environment).returncode)


def measure(options: argparse.Namespace) -> None:
    """Train in this process group and print the table on rank 0."""
    world = zero.setup_distributed()
    batch_size = options.images * world.size
    keys = [f"global_batch={batch_size}", f"micro_batch={options.images}", f"zero_stage={options.zero_stage}"]
    recipe = load_recipe(options.recipe, [*keys, f"output={options.folder}", "keep_checkpoints=1", *options.overrides])
    plan = recipe.plan(world.size, samples=10**6)
    torch.manual_seed(0)
    method = recipe.method.build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)
    parameters = sum(p.numel() for p in method.parameters())
    engine = zero.initialize(Pretraining(method), recipe, plan)
    batch = _batch(recipe, options.images, world)
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    _round(engine, recipe, plan, world, batch, "none", 2)  # to warm up
    for _ in range(options.rounds):
        for kind in KINDS:
            rounds[kind].append(_round(engine, recipe, plan, world, batch, kind, options.steps))
    medians = {
        kind: {name: statistics.median(each[name] for each in found) for name in found[0]}
        for kind, found in rounds.items()
    }
    if world.is_main:
        _report(options, recipe, parameters, medians, rounds)
    zero.shutdown()


def _round(
    engine: Any, recipe: Recipe, plan: RunPlan, world: zero.World, batch: Batch, kind: str, steps: int
) -> dict[str, float]:
    folder = Path(recipe.output) / "checkpoints"
    saver = Saver(engine, replace(recipe, checkpoint_async=kind == "beside training"), plan, "digest", world)
    blocked, in_place = 0.0, 0.0
    dist.barrier()
    begun = time.perf_counter()
    for step in range(steps):
        loss = engine(batch).loss
        zero.backward(engine, loss)
        saver.advance(agree(loss, 0, [], saver.pending, world).saving)
        zero.step(engine)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        if step == 0 and kind != "none":
            stopped = time.perf_counter()
            if kind == "DeepSpeed's":
                engine.save_checkpoint(str(folder), tag="step-1", save_latest=False)
            else:
                saver.save(1, LossMean())
            blocked = time.perf_counter() - stopped
        if not in_place and (folder / "step-1").is_dir():
            in_place = step + 1
    seconds = time.perf_counter() - begun
    saver.wait()
    size = sum(path.stat().st_size for path in folder.glob("step-1/*"))
    dist.barrier()
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    return {"seconds": seconds, "blocked": blocked, "steps": max(in_place - 1, 0), "bytes": size}


def _batch(recipe: Recipe, images: int, world: zero.World) -> Batch:
    size, sampler = recipe.data.image_size, recipe.sampler()
    keys = [f"{world.rank}-{i}" for i in range(images)]
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8)
    masks = sampler.stack([sampler(sample_seed(0, 0, key)) for key in keys])
    return Batch(pixels, masks, torch.zeros(images, dtype=torch.int64), keys).to(world.device)


def _report(
    options: argparse.Namespace, recipe: Recipe, parameters: int, medians: dict[str, Any], rounds: dict[str, Any]
) -> None:
    plain = medians["none"]["seconds"]
    print(
        f"{recipe.name}, {parameters:,} parameters, ZeRO-{recipe.zero_stage} in {recipe.precision}, {options.ranks} "
        f"ranks, {plain / options.steps:.2f} s a step without checkpoints (medians of {options.rounds} rounds)"
    )
    print(f"{'checkpoint':<16} {'blocked':>9} {'extra':>9} {'in place after':>15} {'bytes':>14} {'a parameter':>12}")
    for kind, found in medians.items():
        if kind != "none":
            print(
                f"{kind:<16} {found['blocked']:>7.2f} s {found['seconds'] - plain:>7.2f} s {found['steps']:>9.0f} steps"
                f" {found['bytes']:>14,.0f} {found['bytes'] / parameters:>12.2f}"
            )
    if options.out:
        told = {"command": " ".join(sys.argv), "parameters": parameters, "medians": medians, "rounds": rounds}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
