"""What a run tells about itself: ``metrics.jsonl``, TensorBoard, Weights & Biases, and a line for the eye."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ummim.errors import UserError, drop_output, write_line

if TYPE_CHECKING:
    from ummim.engine.zero import World
    from ummim.run_config import RunConfig
    from ummim.run_plan import RunPlan

FILE = "metrics.jsonl"
QUIET_SECONDS = 10.0  # between two plain lines


def drop_after(path: Path, step: int) -> None:
    """Keep the whole lines of ``path`` up to and with ``step``; what is torn or later was never checkpointed."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step:
            kept.append(line + "\n")
    _replace(path, "".join(kept))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


def peak_memory(device: torch.device) -> float:
    """The most memory this process has held, in MiB: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Meter:
    """Wall time of the optimizer steps since the last ``read``; checkpoints and figures between them do not count."""

    def __init__(self) -> None:
        self._steps, self._elapsed, self._waited = 0, 0.0, 0.0

    def step(self, elapsed: float, waited: float) -> None:
        """Count one step of ``elapsed`` seconds, ``waited`` of them for data."""
        self._steps += 1
        self._elapsed += elapsed
        self._waited += waited

    def read(self, global_batch: int) -> dict[str, float]:
        """``images_per_second`` over all ranks and ``data_wait`` (0 to 1) on this one; starts anew."""
        rates = {
            "images_per_second": self._steps * global_batch / self._elapsed,
            "data_wait": self._waited / self._elapsed,
        }
        self._steps, self._elapsed, self._waited = 0, 0.0, 0.0
        return rates


class MetricsLog:
    """Writes on rank 0 and does nothing on the others. Use as a context manager.

    Lines after ``start_step`` in an earlier ``metrics.jsonl`` are dropped: they are about to be trained again.
    """

    def __init__(self, recipe: RunConfig, plan: RunPlan, start_step: int, world: World) -> None:
        self.output = Path(recipe.output)
        self._sinks: list[Any] = []
        self._wandb: Any = None
        if not world.is_main:
            return
        self.output.mkdir(parents=True, exist_ok=True)
        drop_after(self.output / FILE, start_step)
        self._file = (self.output / FILE).open("a")
        self._sinks = [self._write_line]
        if recipe.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.output / "tensorboard"), purge_step=start_step + 1)
            self._sinks.append(self._write_board)
        if recipe.wandb:
            self._wandb = _start_wandb(recipe)
            self._sinks.append(lambda record: self._wandb.log(record, step=record["step"]))
        self._progress = Progress(plan, start_step)
        self._sinks.append(self._progress.show)

    def log(self, record: dict[str, Any]) -> None:
        """Write one optimizer step's numbers; what is not finite becomes null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        for sink in self._sinks:
            sink(clean)

    def amend(self, step: int, values: Mapping[str, float]) -> None:
        """Add ``values`` to the line that was written for ``step`` before the run stopped, if there is one."""
        if not self._sinks or not values:
            return
        path = self.output / FILE
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            if record["step"] == step:
                record.update(values)
        self._file.close()
        _replace(path, "".join(json.dumps(record) + "\n" for record in records))
        self._file = path.open("a")
        if self._write_board in self._sinks:
            self._write_board({"step": step, **values})
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def advance(self, step: int) -> None:
        """Move the progress bar: ``step`` optimizer steps are done."""
        if self._sinks:
            self._progress.advance(step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._sinks:
            self._progress.close()
            self._file.close()
        if self._write_board in self._sinks:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if exception[0] is None else 1)
        self._sinks = []

    def _write_line(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _write_board(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, record["step"])


def _start_wandb(recipe: RunConfig) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(f"wandb={recipe.wandb}: wandb is not installed: pip install wandb, or unset it") from error
    output = str(Path(recipe.output).resolve())
    run = hashlib.sha256(output.encode()).hexdigest()[:16]  # the same folder goes on in the same W&B run
    return wandb.init(project=recipe.wandb, name=recipe.name, dir=output, id=run, resume="allow")


class Progress:
    """A bar on a terminal; elsewhere a plain line at a logged step, the first and the last one included."""

    def __init__(self, plan: RunPlan, start_step: int) -> None:
        self.plan = plan
        self._printed = -math.inf
        self._begun, self._start = time.monotonic(), start_step
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=plan.stop_step, initial=start_step, unit="step", dynamic_ncols=True)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, record: dict[str, Any]) -> None:
        """Put the numbers of a logged step before the eye."""
        loss = "not a number" if record["loss"] is None else f"{record['loss']:.4f}"
        rate = f"{record['images_per_second']:.1f} images/s"
        if self._bar is not None:
            self._bar.set_description(f"epoch {record['epoch']:.2f}", refresh=False)
            self._bar.set_postfix_str(f"loss {loss}, {rate}")
            return
        step, now = record["step"], time.monotonic()
        if now - self._printed < QUIET_SECONDS and step != self.plan.stop_step:
            return
        self._printed = now
        left = (now - self._begun) / max(step - self._start, 1) * (self.plan.stop_step - step)
        line = f"epoch {record['epoch']:.2f}  step {step}/{self.plan.stop_step}  loss {loss}  {rate}"
        try:
            write_line(f"{line}  ETA {tqdm.format_interval(left)}", sys.stdout)
        except BrokenPipeError:  # a training outlives whoever read its output
            drop_output()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
