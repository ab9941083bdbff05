"""Train the toy under every ZeRO stage, precision and activation checkpointing, in one process group.

Prints one JSON line per case on rank 0: losses, gradient norms, a digest of the consolidated weights, and the types in
which gradients were reduced.
"""

import json
import sys
import traceback
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.engine.toy import ToyPlan, ToyRecipe, build_toy, toy_batches
from ummim.engine import zero, zero_state
from ummim.engine.metrics import FILE
from ummim.engine.resume import restore
from ummim.engine.trainer import fit
from ummim.errors import UserError


class Reductions(TorchDispatchMode):
    """The types in which gradients are reduced over the ranks; other collectives that add are of fewer numbers."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and "reduce" in func.__name__:
            tensors = [value for value in tree_leaves(args) if isinstance(value, torch.Tensor)]
            self.types |= {str(value.dtype) for value in tensors if value.numel() > 1000}
        return func(*args, **(kwargs or {}))


def train(case, plan, world, folder, resume="auto"):
    recipe = ToyRecipe(output=str(folder), resume=resume, checkpoint_every=case.pop("every", 0), **case)
    engine = zero.initialize(build_toy(seed=world.rank), recipe, plan)  # rank 0's weights must win
    state = restore(engine, recipe, plan, "digest", world)
    with Reductions() as reductions:
        fit(engine, toy_batches(plan, world.rank, state.step), recipe, plan, world, state)
    weights = zero_state.full_state_dict(engine)
    engine.destroy()
    return weights, sorted(reductions.types)


def main():
    cases = json.loads(sys.argv[1])
    world = zero.setup_distributed()
    scratch = [mkdtemp() if world.is_main else ""]
    torch.distributed.broadcast_object_list(scratch, src=0)
    for number, case in enumerate(cases):
        folder = Path(scratch[0]) / str(number)
        split, steps = case.pop("split", None), case.pop("steps", ToyPlan().stop_step)
        try:
            if split:
                train(dict(case), ToyPlan(stop_step=split), world, folder)
            weights, reduced = train(dict(case), ToyPlan(stop_step=steps), world, folder)
        except UserError as error:  # a CPU without float16; every rank gets it
            if world.is_main:
                print(json.dumps({"error": str(error)}), flush=True)
            continue
        except BaseException:
            traceback.print_exc()
            raise
        if world.is_main:
            lines = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
            sums = {name: value.double().sum().item() for name, value in weights.items()}
            losses, norms = [r["loss"] for r in lines], [r["grad_norm"] for r in lines]
            print(json.dumps({"losses": losses, "norms": norms, "sums": sums, "reduced": reduced}), flush=True)
    zero.shutdown()


if __name__ == "__main__":
    main()
