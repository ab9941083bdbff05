"""Run many evaluations, fine-tunings and probes, in one process group; rank 0 prints a JSON line for each.

Arguments: a file with a JSON list of cases, each a list of a recipe file and ``key=value`` overrides. With
``stop=N`` among them, the last rank gets a SIGTERM at its N-th batch of an evaluation; ``delete=FILE`` removes a file
before. A line holds the exit code, the lines of metrics, and ``evaluation.json``.
"""

import gc
import json
import os
import signal
import sys
import traceback
from itertools import count
from pathlib import Path
from typing import Any

from ummim.downstream.evaluate import FILE
from ummim.downstream.recipe import ClassifyRecipe
from ummim.downstream.run import Beat, classify
from ummim.engine import metrics, resume, zero
from ummim.engine.trainer import unwatched
from ummim.engine.watchdog import EVALUATE
from ummim.recipe_file import load_recipe


def stopping(batch: int) -> Beat:
    """A beat that ends this process by a signal when an evaluation comes to a batch (from 1)."""
    seen = count(1)

    def beat(step: int, phase: str) -> None:
        if phase == EVALUATE and next(seen) == batch:
            os.kill(os.getpid(), signal.SIGTERM)

    return beat


def told(output: Path) -> dict[str, Any]:
    """What a run has left behind."""
    log, evaluation = output / metrics.FILE, output / FILE
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return {"metrics": lines, "evaluation": json.loads(evaluation.read_text()) if evaluation.exists() else None}


def main() -> None:
    world = zero.setup_distributed()
    gc.freeze()  # a million objects of the libraries, which each of DeepSpeed's collections would go through
    for recipe_file, *words in json.loads(Path(sys.argv[1]).read_text()):
        stop = [int(word.removeprefix("stop=")) for word in words if word.startswith("stop=")]
        if world.is_main:
            for word in words:
                if word.startswith("delete="):
                    Path(word.removeprefix("delete=")).unlink()
        overrides = [word for word in words if not word.startswith(("stop=", "delete="))]
        recipe = load_recipe(recipe_file, overrides, ClassifyRecipe)
        beat = stopping(stop[0]) if stop and world.rank == world.size - 1 else unwatched
        try:
            code = classify(recipe, world, beat)
        except BaseException:
            traceback.print_exc()
            raise
        while resume._locks:
            resume._locks.pop().close()
        if world.is_main:
            print(json.dumps({"code": code, **told(Path(recipe.output))}), flush=True)
    zero.shutdown()


if __name__ == "__main__":
    main()
