"""Samples that could not be read: counted over all ranks, logged with their places, held against a budget."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist

from ummim.engine.faults import raise_together
from ummim.engine.metrics import drop_after
from ummim.errors import DataError

if TYPE_CHECKING:
    from ummim.engine.zero import World
    from ummim.run_config import RunConfig
    from ummim.run_plan import RunPlan

log = logging.getLogger(__name__)

TOLD = 5  # faults that a rank tells one by one; all are in its file


class FaultLog:
    """``data_faults.jsonl`` in the run's folder, or ``data_faults-RANK.jsonl`` where there are several ranks.

    A line is something that could not be read: the step, the fields of the batch's fault, and no more. What was tried
    in a bad sample's place, and was bad too, has a line, but does not count. Lines after ``start_step`` are dropped:
    those steps are about to be trained again.

    ``total``: bad samples on all ranks since this start.
    """

    def __init__(self, recipe: RunConfig, plan: RunPlan, start_step: int, world: World) -> None:
        self.recipe, self.plan, self.world = recipe, plan, world
        name = "data_faults.jsonl" if world.size == 1 else f"data_faults-{world.rank}.jsonl"
        self.path = Path(recipe.output) / name
        drop_after(self.path, start_step)
        self.samples = plan.steps_per_epoch * plan.global_batch  # of an epoch
        self.allowed = int(recipe.data.max_bad * self.samples + 1e-6)
        self.total = 0
        self._first: tuple[int, Any] | None = None  # on this rank, of the epoch: step and fault
        self._epoch, self._in_epoch, self._told = -1, 0, 0

    def count(self, step: int, mine: Sequence[Any], everywhere: int) -> bool:
        """Log this rank's faults in ``step`` (1 is the first); say whether the epoch's are now more than allowed.

        everywhere: those of all ranks in this step, so that every rank says the same.
        """
        epoch = (step - 1) // self.plan.steps_per_epoch
        if epoch != self._epoch:
            self._epoch, self._in_epoch, self._first = epoch, 0, None
        self._in_epoch += everywhere
        self.total += everywhere
        if mine:
            lost = [fault for fault in mine if fault.replacement is None]
            self._first = (step, lost[0]) if lost else self._first or (step, mine[0])
            self._write(step, mine)
        return self._in_epoch > self.allowed

    def stop(self, step: int, saved: bool) -> NoReturn:
        """End the run with one message that names the epoch's first fault, or the one that could not be replaced.

        Every rank must call it.
        """
        firsts: list[tuple[int, Any] | None] = [None] * self.world.size
        dist.all_gather_object(firsts, self._first)
        faults = [first for first in firsts if first is not None]
        lost = [fault for _, fault in faults if fault.replacement is None]
        first = describe(lost[0] if lost else min(faults)[1])
        if saved:
            text = (
                f"{self._in_epoch} of {self.samples} samples of epoch {self._epoch + 1} cannot be read, and "
                f"data.max_bad = {self.recipe.data.max_bad:g} allows {self.allowed}: mend the shards, or allow more. "
                f"The first is {first}. All are listed in {self.path.with_name('data_faults*.jsonl')}; saved after "
                f"step {step}, from where the same command goes on"
            )
        else:
            text = (
                f"{first}, and no other sample can be read in its place: are the shards still there? Stopped in step "
                f"{step}; the same command goes on from the last checkpoint"
            )
        raise_together(DataError(text), self.world)

    def _write(self, step: int, mine: Sequence[Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            for fault in mine:
                file.write(json.dumps({"step": step, **fault._asdict()}) + "\n")
        for fault in [fault for fault in mine if fault.replacement is not None][: TOLD - self._told]:
            self._told += 1
            more = f"; further ones are told in {self.path} alone" if self._told == TOLD else ""
            log.warning("step %d: %s; %r is read instead%s", step, describe(fault), fault.replacement, more)


def describe(fault: Any) -> str:
    """A fault in words: shard, key, byte and reason."""
    return f"{fault.shard}: key {fault.key!r} at byte {fault.byte}: {fault.reason}"
