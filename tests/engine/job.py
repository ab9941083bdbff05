"""The toy job as a program: ``job.py '{"recipe": {...}, "plan": {...}, "task": {...}, "fault": {...}}'``.

fault: {"step": N, "signal": NAME, "rank": R} sends this process a signal as it is fed step N (0-based);
{"step": N, "nan": true} makes the images of the last rank's first micro-batch not a number.
"""

import json
import os
import signal
import sys
from dataclasses import replace

from tests.engine.toy import ToyPlan, ToyRecipe, build_toy, toy_batches
from ummim.engine import zero
from ummim.engine.trainer import train
from ummim.errors import run_main


def main() -> int:
    arguments = json.loads(next(a for a in sys.argv[1:] if a.startswith("{")))
    world = zero.setup_distributed()
    recipe = ToyRecipe(**arguments.get("recipe", {}))
    plan = replace(ToyPlan(world_size=world.size), **arguments.get("plan", {}))
    fault = arguments.get("fault", {})

    def batches(done):
        for index, batch in enumerate(toy_batches(plan, world.rank, done)):
            if fault and index == (fault["step"] - done) * plan.accumulation:
                if "signal" in fault and world.rank == fault.get("rank", world.rank):
                    os.kill(os.getpid(), getattr(signal, fault["signal"]))
                if fault.get("nan") and world.rank == world.size - 1:
                    batch.images.fill_(float("nan"))
            yield batch

    def epoch_end(epoch):
        if world.is_main:
            print(f"epoch end {epoch}", flush=True)

    return train(build_toy(**arguments.get("task", {})), recipe, plan, world, "digest", batches, epoch_end)


if __name__ == "__main__":
    code = run_main(main)
    zero.shutdown()
    sys.exit(code)
