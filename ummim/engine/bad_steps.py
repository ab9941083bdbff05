"""Optimizer steps whose loss or gradient cannot be used: found, told, left out, up to a budget."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from ummim.engine import checkpoint, zero, zero_state
from ummim.engine.faults import on_every_rank, on_main, raise_together
from ummim.errors import UserError

if TYPE_CHECKING:
    from ummim.engine.trainer import Accumulated
    from ummim.engine.zero import World
    from ummim.run_config import RunConfig

log = logging.getLogger(__name__)

FILE = "bad_steps.jsonl"
FOLDER = "bad_steps"
DECAY = 0.98  # of the mean of past losses, per step: it looks back about 50 steps
SETTLED = 50  # losses in the mean before a loss is measured against it
BUNDLES = 3  # most bad steps of a run whose batches and weights are kept


@dataclass(frozen=True)
class BadStepConfig:
    """What becomes of a step whose loss or gradient is not finite, or whose loss leaps.

    Attributes:
        rule: ``stop`` ends the run; ``skip`` drops the step's update and goes on; ``rollback`` goes back to the newest
            checkpoint and leaves the step out when it comes by again.
        budget: most bad steps of a run; the next one ends it.
        spike: a loss above this many times the recent mean is bad, too; 0: only what is not finite is.
        margin: with ``rollback``, the steps before a bad one that are left out with it.
    """

    rule: Literal["stop", "skip", "rollback"] = "stop"
    budget: int = 10
    spike: float = 0.0
    margin: int = 0


class BadStepError(UserError):
    """A step's loss or gradient cannot be used, and the recipe's rule or budget ends the run."""


class GoBack(Exception):
    """Go on from ``checkpoint`` instead."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class LossMean:
    """The exponential mean of the losses of a run's good steps: part of its state."""

    value: float = 0.0
    count: int = 0

    def add(self, loss: float) -> LossMean:
        share = max(1 - DECAY, 1 / (self.count + 1))  # a plain mean at first
        return LossMean(self.value + share * (loss - self.value), self.count + 1)


class BadSteps:
    """The bad steps of a run. ``bad_steps.jsonl`` lists those to leave out, one a line, by ``step`` (the first is 1).

    A listed step is read, so that the order stays, and not trained on: so a run that resumes before it, or has
    been sent back, meets it no more. Every rank holds the same list. ``mean`` is of the losses so far.
    """

    def __init__(self, recipe: RunConfig, mean: LossMean, settle: Callable[[], None], world: World) -> None:
        """``settle`` ends the checkpoint under way, if there is one: a bad step may end the run or send it back."""
        self.recipe, self.config, self.world, self.mean, self.settle = recipe, recipe.bad_steps, world, mean, settle
        self.path = Path(recipe.output) / FILE
        self.listed = on_main(lambda: read(self.path), world)

    def update(self, engine: Any, step: int, loss: float, micro: Accumulated) -> float | None:
        """Take optimizer step number ``step`` and return the gradient's norm; None where no weight has changed.

        ``loss``: the mean over all ranks, each of which must call it. Raises BadStepError where a bad step ends the
        run, and GoBack where it sends it back; the weights are then those from before the step.
        """
        wrong = self._judge(loss)
        if wrong:
            unfit = [i for i, each in enumerate(micro.losses) if not torch.isfinite(each)]
            self._record(engine, step, wrong, micro, range(len(micro.losses)) if math.isfinite(loss) else unfit)
        norm = zero.step(engine, drop=wrong is not None)
        if norm is None and not wrong and self.recipe.precision != "fp16":  # whose loss scale adapts by overflows
            wrong = "the gradient is not finite"
            self._record(engine, step, wrong, micro, range(len(micro.losses)))
        if wrong is None and norm is not None:
            self.mean = self.mean.add(loss)
        if wrong and self.config.rule == "rollback":
            self._go_back(step)
        return norm

    def _judge(self, loss: float) -> str | None:
        """What is wrong with a step's loss, if anything."""
        if not math.isfinite(loss):
            return "the loss is not finite"
        if self.config.spike and self.mean.count >= SETTLED and loss > self.config.spike * self.mean.value:
            return f"the loss leaps to {loss:.4g}, {loss / self.mean.value:.1f} times its recent mean,"
        return None

    def _go_back(self, step: int) -> None:
        """Raise GoBack, if there is a checkpoint from before what is left out; else go on, as under ``skip``."""
        before = step - self.config.margin
        folder = self.path.parent / checkpoint.FOLDER
        found = on_main(lambda: checkpoint.steps(folder), self.world)
        earlier = [path for path in found if int(path.name[5:]) < before]
        if earlier:
            raise GoBack(earlier[0])
        if self.world.is_main:
            log.warning("no checkpoint from before step %d to go back to: its update is dropped instead", before)

    def _record(self, engine: Any, step: int, wrong: str, micro: Accumulated, culprits: Sequence[int]) -> None:
        """Keep what a bad step was made of, and put it on the list, before any weight has changed."""
        self.settle()
        keys = self._gather([key for i in culprits for key in micro.batches[i].keys])
        bundle = self._bundle(engine, step, micro, culprits)
        shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        text = f"{wrong} at step {step} (samples: {shown or 'no keys'})"
        rerun = f"; `ummim replay {bundle}` reruns it alone" if bundle else ""
        bad = sum(entry["bad"] for entry in self.listed.values())
        if self.config.rule == "stop":
            remedy = (
                "The checkpoints before it are good: lower optim.base_lr, set optim.clip_grad, use precision=bf16 or "
                f"fp32, or leave such steps out with bad_steps.rule=skip or rollback, and run again{rerun}"
            )
            raise_together(BadStepError(f"{text}. {remedy}"), self.world)
        if bad >= self.config.budget:
            remedy = f"bad_steps.budget = {self.config.budget} allows no more: lower optim.base_lr, say"
            raise_together(BadStepError(f"{text}, after {bad} bad steps. {remedy}{rerun}"), self.world)
        margin = self.config.margin if self.config.rule == "rollback" else 0
        entries: list[dict[str, Any]] = [
            {"step": s, "reason": f"before step {step}", "bad": False} for s in range(step - margin, step)
        ]
        entries.append({"step": step, "reason": wrong, "bad": True, "keys": keys})
        self._list([entry for entry in entries if entry["step"] > 0 and entry["step"] not in self.listed])
        if self.world.is_main:
            log.warning("%s: left out (%d of at most %d)%s", text, bad + 1, self.config.budget, rerun)

    def _gather(self, keys: list[str]) -> list[str]:
        everywhere: list[list[str]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(everywhere, keys)
        return [key for rank in everywhere for key in rank]

    def _list(self, entries: list[dict[str, Any]]) -> None:
        self.listed.update({entry["step"]: entry for entry in entries})

        def write() -> None:
            temporary = self.path.with_name(f".tmp-{FILE}")
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in self.listed.values()))
            temporary.replace(self.path)

        on_main(write, self.world)

    def _bundle(self, engine: Any, step: int, micro: Accumulated, culprits: Sequence[int]) -> Path | None:
        """Write the step's culprits and the weights that met them, if there is room; returns the folder."""
        parent = self.path.with_name(FOLDER)
        folder = parent / f"step-{step}"

        def prepare() -> bool:
            others = [path for path in parent.glob("step-*") if path != folder]
            if len(others) >= BUNDLES:
                return False
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            return True

        if not on_main(prepare, self.world):
            return None
        weights = zero_state.full_state_dict(engine)

        def write() -> None:
            for i in culprits:
                told = {"step": step, "rank": self.world.rank, "micro_batch": i, "loss": repr(micro.losses[i].item())}
                micro.batches[i].save(folder / f"rank-{self.world.rank}-{i}.safetensors", told)
            if self.world.is_main:
                save_file(weights, folder / "model.safetensors")
                recipe = Path(self.recipe.output) / "recipe.yaml"
                if recipe.is_file():
                    shutil.copyfile(recipe, folder / recipe.name)

        on_every_rank(write, self.world)
        return folder


def read(path: Path) -> dict[int, dict[str, Any]]:
    """The entries of ``bad_steps.jsonl`` by step; {} if there is none. A line torn by a kill is passed over.

    A line of one's own needs no more than ``{"step": N}``.
    """
    listed: dict[int, dict[str, Any]] = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            listed[int(entry["step"])] = {"bad": False, "reason": "listed", **entry}
        except (ValueError, KeyError, TypeError):
            continue
    return listed
