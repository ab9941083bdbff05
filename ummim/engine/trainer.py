"""The only training loop. It meets a task as ``task(batch) -> TaskOutput`` and ``task.blocks()``, and as
``task.parameter_groups(weight_decay)`` where a task has learning rates of its own; no more."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ummim.engine import resume, zero
from ummim.engine.bad_steps import BadSteps, GoBack, LossMean
from ummim.engine.checkpoint import is_due
from ummim.engine.checkpoint_saver import Saver
from ummim.engine.data_faults import FaultLog
from ummim.engine.faults import Interrupts, agree, agreed_stop
from ummim.engine.metrics import Meter, MetricsLog, peak_memory
from ummim.engine.optim import build_schedule
from ummim.engine.watchdog import AGREE, BACKWARD, FORWARD, READ, RESTORE, SAVE, START, STEP

if TYPE_CHECKING:
    from ummim.engine.checkpoint import RunState
    from ummim.engine.zero import World
    from ummim.run_config import RunConfig
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
    batches: list[Any]  # as they came from the loader
    faults: list[Any]  # the samples that could not be read
    waited: float  # seconds spent waiting for data

    @property
    def loss(self) -> Tensor:
        return torch.stack(self.losses).mean()


class Pause(NamedTuple):
    """An epoch's end, or the run's, between two optimizer steps."""

    engine: Any
    step: int
    """Optimizer steps done."""
    interrupts: Interrupts
    resumed: bool
    """The run has just gone on from a checkpoint of this very step: what was done at it need not be done again."""


OnEpochEnd = Callable[[Pause], Mapping[str, float] | None]
"""What is done then, on every rank (ZeRO-3 needs all of them for a forward pass): numbers for the step's line of
metrics, or None where an interruption, agreed on by all ranks, cut it short; it is called again when the run goes on.
"""


def unwatched(step: int, phase: str) -> None:
    """In place of ``Watchdog.beat``."""


def train(
    task: nn.Module,
    recipe: RunConfig,
    plan: RunPlan,
    world: World,
    digest: str,
    build_batches: Callable[[int], Iterable[Any]],
    on_epoch_end: OnEpochEnd | None = None,
    beat: Callable[[int, str], None] = unwatched,
    ema: float = 0.0,
) -> int:
    """Start or resume the run that ``recipe`` describes, train to its end, and return the exit code.

    digest: of the data's index; a checkpoint of other data is refused. ``build_batches(done)`` yields this rank's
    micro-batches from optimizer step ``done`` on, ``plan.accumulation`` of them per step. ``beat``: a watchdog's.
    ``ema``: the decay of a moving average of the weights, ``engine.average``. 0: done; 130, 143: interrupted, and
    saved. Raises CheckpointError, DataError and UserError.
    """
    beat(0, START)
    engine = zero.initialize(task, recipe, plan, ema)
    while True:
        beat(0, RESTORE)
        state = resume.restore(engine, recipe, plan, digest, world)
        if world.is_main and state.step:
            log.warning("resuming %s after step %d of %d", recipe.output, state.step, plan.stop_step)
        try:
            return fit(engine, build_batches(state.step), recipe, plan, world, state, on_epoch_end, beat)
        except GoBack as back:
            recipe = replace(recipe, resume=str(back.checkpoint))


def fit(
    engine: Any,
    batches: Iterable[Any],
    recipe: RunConfig,
    plan: RunPlan,
    world: World,
    state: RunState,
    on_epoch_end: OnEpochEnd | None = None,
    beat: Callable[[int, str], None] = unwatched,
) -> int:
    """Take the optimizer steps from ``state`` to ``plan.stop_step``; see ``train``."""
    done, mean = state.step, LossMean(state.loss_mean, state.loss_count)
    meter, saver = Meter(), Saver(engine, recipe, plan, state.index_digest, world)
    stream = (batch for batch in batches)  # a generator: closing it ends the loader's workers, whatever happens
    schedule = build_schedule(engine.optimizer, recipe.optim, plan)

    def settle() -> None:
        beat(done + 1, SAVE)
        saver.wait()

    faults, bad_steps = FaultLog(recipe, plan, done, world), BadSteps(recipe, mean, settle, world)
    with closing(stream), Interrupts() as interrupts, MetricsLog(recipe, plan, done, world) as metrics:
        missed = at_end(on_epoch_end, Pause(engine, done, interrupts, resumed=True), plan) if done else {}
        if missed is None:
            return leave(interrupts, done, world)
        metrics.amend(done, missed)
        while done < plan.stop_step:
            begun = time.perf_counter()
            seeds = [step_seed(recipe.seed, done, world.rank, i) for i in range(plan.accumulation)]
            schedule.step_update(done)
            lr = engine.optimizer.param_groups[-1]["lr"]
            left_out = done + 1 in bad_steps.listed
            micro = accumulate(None if left_out else engine, stream, seeds, world.device, beat, done + 1)
            loss, stop, unread, lost, saving = agree(micro.loss, interrupts.code, micro.faults, saver.pending, world)
            saver.advance(saving)
            too_bad = faults.count(done + 1, micro.faults, unread)
            if lost:
                settle()
                faults.stop(done + 1, saved=False)
            beat(done + 1, STEP)
            norm = None if left_out else bad_steps.update(engine, done + 1, loss, micro)
            done += 1
            meter.step(time.perf_counter() - begun, micro.waited)
            metrics.advance(done)
            told = at_end(on_epoch_end, Pause(engine, done, interrupts, resumed=False), plan)
            stop = agreed_stop(interrupts.code, world) if told is None else stop
            if told or told is None or done % recipe.log_every == 0 or done == plan.stop_step:
                record = {**where(done, plan), "loss": loss, "lr": lr, "grad_norm": norm}
                record |= {**meter.read(plan.global_batch), "data_faults": faults.total}
                record |= {"bad_steps": len(bad_steps.listed), "peak_memory_mib": peak_memory(world.device)}
                metrics.log({**record, **average(micro.metrics, world), **(told or {})})
            beat(done, SAVE)
            if stop or too_bad or is_due(done, recipe, plan):
                saver.save(done, bad_steps.mean)
            if stop or too_bad or done == plan.stop_step:
                saver.wait()
            if too_bad:
                faults.stop(done, saved=True)
            if stop:
                return leave(interrupts, done, world)
    return 0


def at_end(on_epoch_end: OnEpochEnd | None, pause: Pause, plan: RunPlan) -> Mapping[str, float] | None:
    """What ``on_epoch_end`` says at an epoch's or the run's end; {} elsewhere."""
    over = pause.step == plan.stop_step or pause.step % plan.steps_per_epoch == 0
    return on_epoch_end(pause) if on_epoch_end is not None and over else {}


def where(done: int, plan: RunPlan) -> dict[str, Any]:
    """How far a run has come after ``done`` optimizer steps."""
    return {"step": done, "epoch": done / plan.steps_per_epoch, "samples": done * plan.global_batch}


def leave(interrupts: Interrupts, done: int, world: World) -> int:
    """End after an interruption: the checkpoint after ``done`` optimizer steps is in place. Returns the exit code."""
    interrupts.leave()
    if world.is_main:
        log.warning("stopped after step %d, saved; the same command goes on from here", done)
    return agreed_stop(interrupts.code, world)


def step_seed(seed: int, step: int, rank: int, index: int = 0) -> int:
    """The seed of drop-path and dropout of a step's micro-batch ``index`` on one rank.

    A pure function, so that any micro-batch can be run again alone.
    """
    text = f"{seed} {step} {rank}" + (f" {index}" if index else "")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def accumulate(
    engine: Any,
    stream: Iterator[Any],
    seeds: Sequence[int],
    device: torch.device,
    beat: Callable[[int, str], None] = unwatched,
    step: int = 1,
) -> Accumulated:
    """Forward and backward of a micro-batch for each of ``seeds``, which its drop-path and dropout are drawn from; the
    last one leaves the gradients reduced over the ranks.

    Without an ``engine`` they are read and left out; the loss is then not a number.
    """
    losses: list[Tensor] = []
    totals: dict[str, Tensor] = {}
    batches: list[Any] = []
    faults: list[Any] = []
    waited = 0.0
    for index, seed in enumerate(seeds):
        beat(step, READ)
        asked = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - asked
        batches.append(batch)
        faults += batch.faults
        if engine is None:
            losses.append(torch.full((), math.nan))
            continue
        beat(step, FORWARD)
        torch.manual_seed(seed)
        output = engine(batch.to(device, non_blocking=True))
        beat(step, BACKWARD)
        zero.backward(engine, output.loss)
        if index < len(seeds) - 1:
            engine.step()  # not at the boundary yet: DeepSpeed only counts
        losses.append(output.loss.detach())
        for name, value in output.metrics.items():
            totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach() / len(seeds)
    beat(step, AGREE)
    return Accumulated(losses, totals, batches, faults, waited)


def average(metrics: dict[str, Tensor], world: World) -> dict[str, float]:
    """Mean over the ranks of each () tensor. Every rank must have the same names."""
    if not metrics:
        return {}
    names = sorted(metrics)
    values = torch.stack([metrics[name].float() for name in names])  # (names,)
    dist.all_reduce(values)
    return dict(zip(names, (values / world.size).tolist(), strict=True))
