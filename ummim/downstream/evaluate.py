"""Accuracy on a labelled set, each image counted exactly once, whatever the number of ranks.

The set is cut into the same batches for any number of ranks, and a batch's numbers are added up in their order, so
the counts are equal and the loss is too, to the last bit, on one kind of device.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ummim.atomic import write_text
from ummim.data import ShardIndex
from ummim.data.config import LabelledDataConfig
from ummim.data.faults import Fault
from ummim.data.labelled import LabelledBatch, build_eval_loader
from ummim.engine.data_faults import describe
from ummim.engine.faults import agreed_stop, raise_together
from ummim.engine.metrics import FILE as METRICS
from ummim.engine.zero import World
from ummim.errors import DataError

FILE = "evaluation.json"


def finite(value: float | None) -> float | None:
    """``value``; None, JSON's null, where it is not finite: JSON knows no NaN."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Accuracy:
    """What a model makes of a set.

    Attributes:
        images: how many were counted.
        top1: share of them, in percent, whose label has the highest logit.
        top5: likewise, one of the five highest.
        loss: mean cross-entropy; None where there are no logits.
        unreadable: images that could not be read, and are not counted.
    """

    images: int
    top1: float
    top5: float
    loss: float | None
    unreadable: int

    def plain(self) -> dict[str, Any]:
        """Its numbers for JSON."""
        return {**asdict(self), "loss": finite(self.loss)}

    def __str__(self) -> str:
        missing = f", {self.unreadable} unreadable" if self.unreadable else ""
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        return f"top-1 {self.top1:.2f}, top-5 {self.top5:.2f}{loss} ({self.images} images{missing})"


@dataclass(frozen=True)
class Part:
    """A batch of the set on this rank. ``counted``: (B,) bool; the others fill it up, or could not be read."""

    number: int  # of the batch in the set
    batch: LabelledBatch
    counted: Tensor


class Parts:
    """This rank's batches of a whole set, one after the other; the ranks have as many of them.

    Iterating ends early, on all ranks, where one of them is interrupted: ``interrupted`` then says so.

    Args:
        index: the set.
        data: how images are read.
        batch: images of a batch, the same for any number of ranks.
        world: this process among all.
        code: the exit code that a signal to this rank asks for.
        beat: called before each batch.
    """

    def __init__(
        self,
        index: ShardIndex,
        data: LabelledDataConfig,
        batch: int,
        world: World,
        code: Callable[[], int] = lambda: 0,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.index, self.data, self.batch, self.world, self.code, self.beat = index, data, batch, world, code, beat
        self.interrupted = False
        self.bad: dict[int, Fault] = {}  # by row

    def __iter__(self) -> Iterator[Part]:
        """Raises DataError where too many images cannot be read."""
        loader = build_eval_loader(self.index, self.data, self.batch, self.world.rank, self.world.size)
        loader.pin_memory = self.world.device.type == "cuda"
        with closing(iter(loader)) as batches:  # type: ignore[type-var]
            number = self.world.rank
            while len(loader):
                self.beat()
                if agreed_stop(self.code(), self.world):
                    self.interrupted = True
                    return
                batch = next(batches)
                rows = torch.arange(number * self.batch, (number + 1) * self.batch)
                failed = {fault.row: fault for fault in batch.faults if fault.attempt == 0}
                self.bad |= {row: fault for row, fault in failed.items() if row in rows.tolist()}
                counted = (rows < len(self.index)) & ~torch.isin(rows, torch.tensor([*failed], dtype=torch.int64))
                yield Part(number, batch.to(self.world.device, non_blocking=True), counted.to(self.world.device))
                number += self.world.size
        self._check()

    def _check(self) -> None:
        everywhere: list[dict[int, Fault]] = [{}] * self.world.size
        dist.all_gather_object(everywhere, self.bad)
        self.bad = {row: fault for bad in everywhere for row, fault in bad.items()}
        if len(self.bad) > self.data.max_bad * len(self.index):
            text = f"{len(self.bad)} of {len(self.index)} images cannot be read: {describe(min(self.bad.values()))}"
            advice = f"Mend the shards, or raise data.max_bad = {self.data.max_bad:g}"
            raise_together(DataError(f"{self.index.place}: {text}. {advice}"), self.world)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it, ``model`` is in eval mode and no gradients are kept; then as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def evaluate(logits: Callable[[Tensor], Tensor], parts: Parts) -> Accuracy | None:
    """The accuracy on a set, the same on every rank; each must call it. None where it was interrupted.

    logits: (B, 3, H, W) uint8 -> (B, classes) float32, of a model in eval mode.
    """
    size = -(-len(parts.index) // (parts.batch * parts.world.size)) * parts.world.size
    table = torch.zeros(size, 4, dtype=torch.float64, device=parts.world.device)  # images, top-1, top-5, loss
    for part in parts:
        outputs, labels = logits(part.batch.images), part.batch.labels
        rank = rank_of_label(outputs, labels)
        losses = F.cross_entropy(outputs, labels, reduction="none").double()
        rows = torch.stack([torch.ones_like(losses), (rank < 1).double(), (rank < 5).double(), losses])  # (4, B)
        table[part.number] = torch.where(part.counted, rows, 0).sum(1)
    if parts.interrupted:
        return None
    dist.all_reduce(table)
    return summed(table, len(parts.bad))


def rank_of_label(outputs: Tensor, labels: Tensor) -> Tensor:
    """(B, C), (B,) -> (B,): how many classes come before the label; of equal logits, the first class does."""
    own = outputs.gather(1, labels[:, None])
    classes = torch.arange(outputs.shape[1], device=outputs.device)
    before = (outputs > own) | ((outputs == own) & (classes < labels[:, None]))
    return torch.where(outputs.isfinite().all(1), before.sum(1), outputs.shape[1])


def summed(table: Tensor, unreadable: int) -> Accuracy:
    """(batches, 4) float64 numbers of each batch, added up in their order."""
    images, top1, top5, loss = (sum(column.tolist()) for column in table.T)
    count = max(images, 1)
    return Accuracy(int(images), 100 * top1 / count, 100 * top5 / count, loss / count, unreadable)


def write_evaluation(folder: Path, told: dict[str, Any], found: dict[str, Accuracy]) -> None:
    """Write ``evaluation.json``: ``told``, and each accuracy's numbers, those of ``weights`` at the top level."""
    values = {**told, **found["weights"].plain()}
    if "average" in found:
        values["ema"] = found["average"].plain()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, json.dumps(values, indent=2) + "\n")


def lacks_evaluation(folder: Path, step: int, metric: str = "val_top1") -> bool:
    """Whether the run's metrics have a line for ``step`` without ``metric``: it was interrupted over it."""
    try:
        lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    except OSError:
        return False
    return any(line["step"] == step and metric not in line for line in lines)
