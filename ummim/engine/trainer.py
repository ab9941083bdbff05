"""The only training loop. It meets a task as ``task(batch) -> TaskOutput`` and ``task.blocks()``, no more."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ummim.engine import checkpoint, resume, zero
from ummim.engine.data_faults import FaultLog
from ummim.engine.faults import Interrupts, agree, raise_non_finite
from ummim.engine.metrics import Meter, MetricsLog, peak_memory
from ummim.engine.optim import build_schedule

if TYPE_CHECKING:
    from ummim.engine.zero import World
    from ummim.recipe import Recipe
    from ummim.run_plan import RunPlan

log = logging.getLogger(__name__)


class TaskOutput(NamedTuple):
    """What a task makes of one micro-batch."""

    loss: Tensor
    """() float32, the mean over the micro-batch: what is minimised."""
    metrics: dict[str, Tensor]
    """Further () tensors to log, detached; averaged over micro-batches and ranks."""


class Accumulated(NamedTuple):
    """One optimizer step's micro-batches on this rank."""

    losses: list[Tensor]
    metrics: dict[str, Tensor]
    keys: list[list[str]]
    faults: list[Any]  # the samples that could not be read
    waited: float  # seconds spent waiting for data

    @property
    def loss(self) -> Tensor:
        return torch.stack(self.losses).mean()


def train(
    task: nn.Module,
    recipe: Recipe,
    plan: RunPlan,
    world: World,
    digest: str,
    build_batches: Callable[[int], Iterable[Any]],
    on_epoch_end: Callable[[int], None] | None = None,
) -> int:
    """Start or resume the run that ``recipe`` describes, train to its end, and return the exit code.

    digest: of the data's index; a checkpoint of other data is refused. ``build_batches(done)`` yields this rank's
    micro-batches from optimizer step ``done`` on, ``plan.accumulation`` of them per step. ``on_epoch_end(epochs
    done)`` runs on every rank (ZeRO-3 needs all of them for a forward pass). 0: done; 130, 143: interrupted, and
    saved. Raises CheckpointError, DataError and UserError.
    """
    engine = zero.initialize(task, recipe, plan)
    done = resume.restore(engine, recipe, plan, digest, world)
    if world.is_main and done:
        log.warning("resuming %s after step %d of %d", recipe.output, done, plan.stop_step)
    return fit(engine, build_batches(done), recipe, plan, world, digest, done, on_epoch_end)


def fit(
    engine: Any,
    batches: Iterable[Any],
    recipe: Recipe,
    plan: RunPlan,
    world: World,
    digest: str,
    done: int,
    on_epoch_end: Callable[[int], None] | None = None,
) -> int:
    """Take the optimizer steps from ``done`` to ``plan.stop_step``; see ``train``."""
    output, meter = Path(recipe.output), Meter()
    stream = (batch for batch in batches)  # a generator: closing it ends the loader's workers, whatever happens
    schedule = build_schedule(engine.optimizer, recipe.optim, plan)
    faults = FaultLog(recipe, plan, done, world)
    with closing(stream), Interrupts() as interrupts, MetricsLog(recipe, plan, done, world) as metrics:
        while done < plan.stop_step:
            begun = time.perf_counter()
            torch.manual_seed(step_seed(recipe.seed, done, world.rank))
            schedule.step_update(done)
            lr = engine.optimizer.param_groups[-1]["lr"]
            micro = accumulate(engine, stream, plan.accumulation, world.device)
            loss, stop, bad, lost = agree(micro.loss, interrupts.code, micro.faults, world)
            too_bad = faults.count(done + 1, micro.faults, bad)
            if lost:
                faults.stop(done + 1, saved=False)
            if not math.isfinite(loss):
                raise_non_finite(done + 1, micro.losses, micro.keys, world)
            norm = zero.step(engine)
            done += 1
            meter.step(time.perf_counter() - begun, micro.waited)
            metrics.advance(done)
            if done % recipe.log_every == 0 or done == plan.stop_step:
                state = {"step": done, "epoch": done / plan.steps_per_epoch, "samples": done * plan.global_batch}
                record = {"loss": loss, "lr": lr, "grad_norm": norm, **meter.read(plan.global_batch)}
                extra = {"data_faults": faults.total, "peak_memory_mib": peak_memory(world.device)}
                extra.update(average(micro.metrics, world))
                metrics.log({**state, **record, **extra})
            if on_epoch_end is not None and done % plan.steps_per_epoch == 0:
                on_epoch_end(done // plan.steps_per_epoch)
            due = recipe.checkpoint_every and done % recipe.checkpoint_every == 0
            if stop or too_bad or due or done == plan.stop_step:
                reached = checkpoint.RunState.at(done, recipe, plan, digest, engine.layout)
                checkpoint.save(engine, output, reached, recipe.keep_checkpoints, world)
            if too_bad:
                faults.stop(done, saved=True)
            if stop:
                if world.is_main:
                    log.warning("stopped after step %d, saved; the same command goes on from here", done)
                return stop
    return 0


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a step's drop-path and dropout on one rank: a pure function, so that any step can be replayed."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=7).digest(), "big")


def accumulate(engine: Any, stream: Iterator[Any], count: int, device: torch.device) -> Accumulated:
    """Forward and backward of ``count`` micro-batches; the last one leaves the gradients reduced over the ranks."""
    losses: list[Tensor] = []
    totals: dict[str, Tensor] = {}
    keys: list[list[str]] = []
    faults: list[Any] = []
    waited = 0.0
    for index in range(count):
        asked = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - asked
        output = engine(batch.to(device, non_blocking=True))
        zero.backward(engine, output.loss)
        if index < count - 1:
            engine.step()  # not at the boundary yet: DeepSpeed only counts
        losses.append(output.loss.detach())
        keys.append(batch.keys)
        faults += batch.faults
        for name, value in output.metrics.items():
            totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach() / count
    return Accumulated(losses, totals, keys, faults, waited)


def average(metrics: dict[str, Tensor], world: World) -> dict[str, float]:
    """Mean over the ranks of each () tensor. Every rank must have the same names."""
    if not metrics:
        return {}
    names = sorted(metrics)
    values = torch.stack([metrics[name].float() for name in names])  # (names,)
    dist.all_reduce(values)
    return dict(zip(names, (values / world.size).tolist(), strict=True))
