"""What a run pays for being watched and logged: time per optimizer step, beside the step's own.

    python benchmarks/overhead.py [RECIPE] [--images N] [--steps N] [--out FILE]

One process on the CPU takes steps of RECIPE's method on noise, N images each, as the trainer does: forward, backward,
the agreement of the ranks, AdamW. Then the parts are timed alone: the beats of a step, its agreement, a line of
metrics, and the guardian process, all of whose time counts, as if it ran on the rank's own core. All is processor
time, which a busy machine does not blur. The goal is less than 1% of a step.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ummim.data import Batch
from ummim.engine import zero
from ummim.engine.faults import agree
from ummim.engine.metrics import MetricsLog
from ummim.engine.watchdog import AGREE, BACKWARD, FORWARD, READ, SAVE, STEP, Watchdog
from ummim.pretrain import Pretraining
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe
from ummim.run_plan import RunPlan

REPEATS = 2000
BEATS = (READ, FORWARD, BACKWARD, AGREE, STEP, SAVE)  # of a step without accumulation


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of watchdog, agreement and metrics.")
    parser.add_argument("recipe", nargs="?", default="mae_vit_base_800e")
    parser.add_argument("--images", type=int, default=8, help="images of a step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--idle", type=float, default=20, help="seconds over which the guardian's time is taken")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["data.shards=none", f"output={folder}/run", "precision=fp32", "zero_stage=0", "tensorboard=false"]
        recipe = load_recipe(options.recipe, [*overrides, f"global_batch={options.images}", "log_every=1"])
        Path(folder, "run").mkdir()
        results = measure(recipe, options.images, options.steps, options.idle)
    results |= {"recipe": options.recipe, "images": options.images, "processor": platform.processor()}
    print(json.dumps(results, indent=2))
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


def measure(recipe: Recipe, images: int, steps: int, idle: float) -> dict[str, Any]:
    world = zero.setup_distributed()
    plan = recipe.plan(1, samples=10**6)
    step = training_step(recipe, plan, world, images)
    with Watchdog(recipe, world) as watchdog, MetricsLog(recipe, plan, 0, world) as metrics:
        seconds = processor_time(step, steps)
        guardian = guardian_of(os.getpid())
        parts = {
            "beats": processor_time(lambda: beat_all(watchdog), REPEATS),
            "agreement": processor_time(lambda: agree(torch.tensor(1.0), 0, [], False, world), REPEATS),
            "guardian_per_second": guardian_time(guardian, idle),
        }
        with contextlib.redirect_stdout(io.StringIO()):
            parts["metrics_line"] = processor_time(lambda: metrics.log(record(plan)), REPEATS)
    zero.shutdown()
    per_step = parts["beats"] + parts["agreement"] + parts["metrics_line"]
    return {
        "step_seconds": seconds,
        "microseconds": {name: round(value * 1e6, 1) for name, value in parts.items()},
        "share_of_step_percent": round(100 * (per_step / seconds + parts["guardian_per_second"]), 4),
        "share_of_100_ms_percent": round(100 * (per_step / 0.1 + parts["guardian_per_second"]), 4),
    }


def training_step(recipe: Recipe, plan: RunPlan, world: zero.World, images: int) -> Callable[[], object]:
    method = recipe.method.build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)
    engine = zero.initialize(Pretraining(method), recipe, plan)
    sampler, size = recipe.sampler(), recipe.data.image_size
    noise = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8)
    masks = sampler.stack([sampler(seed) for seed in range(images)])
    batch = Batch(noise, masks, torch.zeros(images, dtype=torch.int64), [""] * images)

    def step() -> None:
        output = engine(batch)
        zero.backward(engine, output.loss)
        agree(output.loss, 0, [], False, world)
        zero.step(engine)

    return step


def beat_all(watchdog: Watchdog) -> None:
    for phase in BEATS:
        watchdog.beat(2, phase)


def record(plan: RunPlan) -> dict[str, float]:
    names = ("step", "epoch", "samples", "loss", "lr", "grad_norm", "images_per_second", "data_wait", "data_faults")
    return dict.fromkeys(names, 1.0) | {"step": plan.stop_step}


def processor_time(function: Callable[[], object], repeats: int) -> float:
    """Seconds of one call; the first is not counted."""
    function()
    begun = time.process_time()
    for _ in range(repeats):
        function()
    return (time.process_time() - begun) / repeats


def guardian_of(parent: int) -> int:
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and (path / "stat").read_text().rpartition(")")[2].split()[1] == str(parent):
            return int(path.name)
    raise RuntimeError("no guardian process")


def guardian_time(pid: int, seconds: float) -> float:
    """Processor seconds per second."""

    def used() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = used()
    time.sleep(seconds)
    return (used() - before) / os.sysconf("SC_CLK_TCK") / seconds


if __name__ == "__main__":
    main()
