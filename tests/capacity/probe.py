"""Count, in a real engine, what ummim.capacity calculates: bytes of states, collectives, activations.

``probe.py '{"states": [...], "activations": [...], "folder": ...}'`` runs every case in one process group and prints a
JSON line for each, rank 0 for all ranks. A state case is keys of ``ToyRecipe`` and, under ``zero``, of DeepSpeed's
``zero_optimization``; an activation case is a recipe and its overrides.
"""

import gc
import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.engine.toy import ToyPlan, ToyRecipe, build_toy, toy_batches
from tests.parallel import batches
from ummim.cost import plain_attention
from ummim.engine import zero
from ummim.pretrain import Pretraining
from ummim.recipe_file import load_recipe

NAMES = {"allreduce_": "all-reduce", "reduce_": "reduce", "_reduce_scatter_base_": "reduce-scatter",
         "_allgather_base_": "all-gather"}  # fmt: skip


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensors of each kind of collective; single numbers are left out."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [v for v in tree_leaves(args) if isinstance(v, torch.Tensor)]
            size = max((v.nbytes for v in tensors if v.numel() > 1), default=0)
            if size:
                self.bytes[NAMES.get(func._opname, func._opname)] += size
        return func(*args, **(kwargs or {}))


def storages():
    """Every storage of more than one number that Python can reach and ``main`` has not frozen, by its address.

    As long as the result lives, no address is given to another storage.
    """
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for value in gc.get_objects():
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                for tensor in (value, value.grad if value.is_leaf else None):
                    if tensor is not None and tensor.numel() > 1:
                        storage = tensor.untyped_storage()
                        found[storage._cdata] = storage
    return found


def settled(known, engine):
    """``held`` once all ranks have sent everything: gloo's threads let go of what was sent a little later."""
    dist.barrier()
    found, before = held(known, engine), None
    while found != before:
        time.sleep(0.2)
        found, before = held(known, engine), found
    return found


def held(known, engine):
    """Bytes of what has come since ``known``: of buckets of communication, and of the rest."""
    gc.collect()
    new = {address: storage.nbytes() for address, storage in storages().items() if address not in known}
    buckets = [bucket.buffer for bucket in getattr(engine.optimizer, "ipg_buckets", {}).values()]
    tensors = [t for b in buckets for t in (b if isinstance(b, list) else [b]) if t is not None]
    mine = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    frozen = {t.untyped_storage()._cdata for t in engine.frozen.values()}  # rank 0's float32 originals
    rest = sum(size for address, size in new.items() if address not in mine and address not in frozen)
    return {"buckets": sum(mine.values()), "rest": rest}


def states(case, world, folder):
    case = dict(case)
    config = json.loads((zero.config_folder() / f"zero{case['zero_stage']}.json").read_text())
    config["zero_optimization"].update(case.pop("zero", {}))
    path = Path(folder) / f"{world.rank}.json"
    path.write_text(json.dumps(config))
    recipe, plan = ToyRecipe(ds_config=str(path), **case), ToyPlan(world_size=world.size)
    stream = iter(list(toy_batches(plan, world.rank)))
    gc.collect()
    known = storages()
    engine = zero.initialize(build_toy(), recipe, plan)
    found = {}
    with Collectives() as collectives:
        for step in range(2):  # in the first, stage 3 learns its order and AdamW makes its moments
            collectives.bytes.clear()
            for index in range(plan.accumulation):
                loss = engine(next(stream)).loss
                zero.backward(engine, loss)
                del loss
                if index < plan.accumulation - 1:
                    engine.step()
                    found["between"] = settled(known, engine) if step == 1 else None
            zero.step(engine)
    found["collectives"] = dict(collectives.bytes)
    engine.destroy()
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, found)
    return everyone


def allocated(profiler):
    """(bytes still held at the end, most bytes at once) of what was allocated under the profiler."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return now, peak


def activations(case, world):
    """Of one micro-batch of a real task in a real engine: what autograd's hooks see, what is held, how far it rises."""
    name, *overrides = case["recipe"]
    recipe = load_recipe(name, overrides)
    plan = recipe.plan(1, 10 * recipe.global_batch)
    method = recipe.method.build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)
    engine = zero.initialize(Pretraining(method), recipe, plan)
    fused = F.scaled_dot_product_attention
    if case["plain"]:
        F.scaled_dot_product_attention = plain_attention  # type: ignore[assignment]
    stream = batches(recipe, plan, 0, 0)
    zero.backward(engine, engine(next(stream)).loss)  # gradients exist from here on
    engine.step()
    batch = next(stream)
    known = {t.untyped_storage()._cdata for t in (*engine.module.parameters(), *engine.module.buffers(), batch.images)}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = engine(batch)
    seen = sum(storage.nbytes() for storage in saved.values())
    del output
    saved.clear()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
        loss = engine(batch).loss
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as backward:
        zero.backward(engine, loss)
    F.scaled_dot_product_attention = fused
    sizes = [p.nbytes for p in engine.module.parameters()]
    engine.destroy()
    return {"seen": seen, "held": allocated(forward)[0], "rise": allocated(backward)[1], "largest": max(sizes),
            "images": plan.micro_batch}  # fmt: skip


def main():
    arguments = json.loads(sys.argv[1])
    world = zero.setup_distributed()
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True  # slow on some CPUs, but the same bytes
    gc.collect()
    gc.freeze()  # a million objects of the libraries, which would be gone through each time
    for case in arguments.get("states", []):
        found = states(case, world, arguments["folder"])
        if world.is_main:
            print(json.dumps(found), flush=True)
    for case in arguments.get("activations", []):
        print(json.dumps(activations(case, world)), flush=True)
    zero.shutdown()


if __name__ == "__main__":
    main()
