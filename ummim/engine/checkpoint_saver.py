"""Who writes what of a checkpoint, and when: every rank its share, in a thread, while training goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from ummim.engine import zero_state
from ummim.engine.checkpoint import FOLDER, RunState, finish, prepare, unwritten, write_rank_file
from ummim.engine.checkpoint_shards import header, rank_file
from ummim.engine.faults import on_main
from ummim.errors import EXIT_USER, CheckpointError

if TYPE_CHECKING:
    from ummim.engine.bad_steps import LossMean
    from ummim.engine.zero import World
    from ummim.run_config import RunConfig
    from ummim.run_plan import RunPlan

POLL_SECONDS = 0.05  # between two questions to all ranks whether they have written

# What came of a rank's part: the error, if any, and the size and checksum of what it wrote, by name.
Report = tuple[str | None, dict[str, Any]]


class Saver:
    """Writes the checkpoints of a run: ``save`` begins one, ``advance`` or ``wait`` ends it.

    Each rank copies its share of the state to host memory and writes it in a thread. When the last rank has
    written, rank 0's thread adds the rest and renames the folder into place. Every rank must call each method at
    the same step; only ``pending`` is a rank's own. A write that fails ends the run in ``advance`` or ``wait``: with
    CheckpointError on rank 0, quietly on the others. The checkpoints before it are untouched and no half one is left.
    """

    def __init__(self, engine: Any, recipe: RunConfig, plan: RunPlan, digest: str, world: World) -> None:
        self.engine, self.recipe, self.plan, self.digest, self.world = engine, recipe, plan, digest, world
        self.folder = Path(recipe.output) / FOLDER
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._job: Future[Report] | None = None
        self._then: Callable[[Report], None] | None = None  # what follows once no rank's job is pending
        self._state: RunState

    @property
    def pending(self) -> bool:
        """Whether this rank still writes."""
        return self._job is not None and not self._job.done()

    def save(self, step: int, mean: LossMean) -> None:
        """Begin the checkpoint after ``step`` optimizer steps, of such losses; an earlier one is ended first."""
        self.wait()
        state = RunState.at(step, self.recipe, self.plan, self.digest, self.engine.layout)
        scalars = zero_state.scalars(self.engine)
        self._state = replace(state, optimizer=scalars, loss_mean=mean.value, loss_count=mean.count)
        on_main(lambda: prepare(self._temporary), self.world)
        tensors = zero_state.tensors_to_save(self.engine)
        if self.recipe.checkpoint_async:
            tensors = copied_to_host(tensors)
        tables = zero_state.tables(self.engine) if self.world.is_main else {}
        told = header(step, self.world.rank, self.world.size, self.engine.layout, **tables)
        path = self._temporary / rank_file(self.world.rank, self.world.size)
        self._begin(lambda: write_rank_file(path, tensors, told), self._after_writing)
        if not self.recipe.checkpoint_async:
            self.wait()

    def advance(self, pending: int) -> None:
        """Go on with the checkpoint under way, if there is one and none of the ranks is ``pending``."""
        if self._then is not None and not pending:
            then, job = self._then, self._job
            self._then = self._job = None
            then(job.result() if job is not None else (None, {}))

    def wait(self) -> None:
        """End the checkpoint under way, if there is one: it is in place on return.

        The ranks ask each other again and again instead of waiting for the slowest in one collective, whose timeout
        may be shorter than a disk is slow.
        """
        while self._then is not None:
            pending = torch.tensor(float(self.pending), device=self.world.device)
            dist.all_reduce(pending)
            self.advance(int(pending))
            if self._job is not None:
                wait([self._job], timeout=POLL_SECONDS)
            elif self._then is not None:
                time.sleep(POLL_SECONDS)

    @property
    def _temporary(self) -> Path:
        return self.folder / f".tmp-step-{self._state.step}"

    def _begin(self, function: Callable[[], dict[str, Any]] | None, then: Callable[[Report], None]) -> None:
        self._then = then
        if function is not None:
            self._job = self._thread.submit(_attempt, function)

    def _after_writing(self, mine: Report) -> None:
        reports: list[Report] = [(None, {})] * self.world.size
        dist.all_gather_object(reports, mine)
        failure = next((error for error, _ in reports if error), None)
        if failure is not None:
            self._fail(failure)
        listing = {name: listed for _, written in reports for name, listed in written.items()}
        final = self._state.milestone or self._state.step == self.plan.stop_step
        keep = self.recipe.keep_checkpoints
        complete = partial(finish, self._temporary, self.folder / f"step-{self._state.step}", self._state, listing)
        self._begin((lambda: complete(final, keep)) if self.world.is_main else None, self._after_finishing)

    def _after_finishing(self, mine: Report) -> None:
        failure = [mine[0]]
        dist.broadcast_object_list(failure, src=0)
        if failure[0] is not None:
            self._fail(failure[0])

    def _fail(self, reason: str) -> NoReturn:
        if not self.world.is_main:
            sys.exit(EXIT_USER)  # rank 0 says it
        raise unwritten(self.folder, self._state, reason)


def _attempt(function: Callable[[], dict[str, Any]]) -> Report:
    try:
        return None, function()
    except (OSError, SafetensorError, CheckpointError) as error:
        return str(error), {}


def copied_to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, where training does not touch them; from a GPU through pinned memory, all at once."""
    large = {key: tensor for key, tensor in tensors.items() if tensor.dtype == torch.float32}
    copies = {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items() if key not in large}
    on_gpu = any(tensor.is_cuda for tensor in large.values())
    host = torch.empty(sum(tensor.numel() for tensor in large.values()), pin_memory=on_gpu)
    parts = host.split([tensor.numel() for tensor in large.values()])
    for part, (key, tensor) in zip(parts, large.items(), strict=True):
        copies[key] = part.view(tensor.shape).copy_(tensor, non_blocking=True)
    if on_gpu:
        torch.cuda.synchronize()
    return copies
