"""Train the toy from scratch or from a checkpoint of other ranks, stage or precision; many cases, one process group.

Arguments: a JSON list of cases. ``train`` says what a case holds. The global batch is always the same eight samples.
"""

import json
import sys
import traceback
from dataclasses import replace

from tests.engine.toy import ToyPlan, ToyRecipe, build_toy, toy_batches
from ummim.engine import zero, zero_state
from ummim.engine.bad_steps import LossMean
from ummim.engine.checkpoint_saver import Saver
from ummim.engine.resume import restore
from ummim.engine.trainer import fit


def train(case, world):
    """Ten steps, a checkpoint after every fifth, into ``case["output"]``.

    With ``from``, a step folder, the first five are those of another run: weights, buffers and frozen parameters
    start out wrong on every rank, and what is restored is saved again at once, into ``OUTPUT-again``. ``scale``: the
    loss scale that fp16 starts from. ``width``: of the toy. ``ema``: the decay of an average of the weights, which is
    put in their place and taken out again at the end.
    """
    plan = ToyPlan(world_size=world.size, accumulation=4 // world.size)
    keys = {name: value for name, value in case.items() if name not in ("from", "scale", "width", "ema")}
    recipe = ToyRecipe(checkpoint_every=5, keep_checkpoints=0, resume=case.get("from", "auto"), **keys)
    task = build_toy(seed=world.rank if "from" in case else 0, dropout=0.0, width=case.get("width", 32))
    if "from" in case:
        task.table.data.fill_(9.0)
        task.get_buffer("scale").fill_(9.0)
    engine = zero.initialize(task, recipe, plan, case.get("ema", 0.0))
    if "scale" in case:
        scaler = getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config
        scaler.cur_scale = case["scale"]
    state = restore(engine, recipe, plan, "digest", world)
    if "from" in case:
        again = Saver(engine, replace(recipe, output=case["output"] + "-again"), plan, "digest", world)
        again.save(state.step, LossMean())
        again.wait()
    fit(engine, toy_batches(plan, world.rank, state.step), recipe, plan, world, state)
    found = [zero_state.full_state_dict(engine)]
    if engine.average is not None:
        with engine.average.in_place():
            found.append(zero_state.full_state_dict(engine))
        found.append(zero_state.full_state_dict(engine))
    engine.destroy()
    return found


def main():
    from deepspeed.accelerator import get_accelerator

    world = zero.setup_distributed()
    # DeepSpeed refuses float16 on a CPU without instructions for it, which computes in it none the less.
    get_accelerator().is_fp16_supported = lambda: True
    for case in json.loads(sys.argv[1]):
        try:
            train(case, world)
        except BaseException:
            traceback.print_exc()
            raise
    zero.shutdown()


if __name__ == "__main__":
    main()
