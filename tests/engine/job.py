"""The toy job as a program: ``job.py '{"recipe": {...}, "plan": {...}, "task": {...}, "fault": {...}}'``.

fault: {"step": N, "signal": NAME, "rank": R} sends this process a signal as it is fed step N (0-based);
{"step": N, "file_limit": BYTES, "rank": R} keeps this process from writing longer files from then on;
{..., "slow_from": N} lets checkpoints from that step on be written, and never be done.
{"step": N, "nan": true} makes the images of the last rank's first micro-batch not a number.
{"step": N, "hang": "forward", "rank": R} lets this process sleep in the forward pass of its N-th micro-batch.
"""

import itertools
import json
import os
import resource
import signal
import sys
import time
from dataclasses import replace

from tests.engine.toy import ToyPlan, ToyRecipe, build_toy, toy_batches
from ummim.engine import checkpoint_saver, zero
from ummim.engine.bad_steps import BadStepConfig
from ummim.engine.trainer import train
from ummim.engine.watchdog import Watchdog
from ummim.errors import run_main


def main() -> int:
    arguments = json.loads(next(a for a in sys.argv[1:] if a.startswith("{")))
    world = zero.setup_distributed()
    keys = arguments.get("recipe", {})
    recipe = ToyRecipe(**{**keys, "bad_steps": BadStepConfig(**keys.get("bad_steps", {}))})
    plan = replace(ToyPlan(world_size=world.size), **arguments.get("plan", {}))
    fault = arguments.get("fault", {})

    write = checkpoint_saver.write_rank_file

    def write_slowly(path, tensors, told):
        listing = write(path, tensors, told)
        while int(told["step"]) >= fault["slow_from"]:
            time.sleep(1)
        return listing

    if "slow_from" in fault:
        checkpoint_saver.write_rank_file = write_slowly

    def batches(done):
        for index, batch in enumerate(toy_batches(plan, world.rank, done)):
            if fault and index == (fault["step"] - done) * plan.accumulation:
                if "signal" in fault and world.rank == fault.get("rank", world.rank):
                    os.kill(os.getpid(), getattr(signal, fault["signal"]))
                if "file_limit" in fault and world.rank == fault["rank"]:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (fault["file_limit"], resource.RLIM_INFINITY))
                if fault.get("nan") and world.rank == world.size - 1:
                    batch.images.fill_(float("nan"))
            yield batch

    def epoch_end(pause):
        if world.is_main:
            print(f"epoch end after step {pause.step}", flush=True)
        return {}

    with Watchdog(recipe, world) as watchdog:
        task = build_toy(**arguments.get("task", {}))
        if fault.get("hang") == "forward" and world.rank == fault["rank"]:
            calls = itertools.count()
            task.register_forward_pre_hook(lambda *_: time.sleep(3600 if next(calls) == fault["step"] else 0))
        return train(task, recipe, plan, world, "digest", batches, epoch_end, watchdog.beat)


if __name__ == "__main__":
    code = run_main(main)
    zero.shutdown()
    sys.exit(code)
