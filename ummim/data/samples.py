"""Picks in, batches out, in one process: read, decode, augment, mask, collate."""

from collections.abc import Container
from contextlib import closing
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ummim.data.attention import AttentionMaps
from ummim.data.augment import Augment, Box, View
from ummim.data.batch import Batch
from ummim.data.config import DataConfig
from ummim.data.faults import Fault, SourceDown, replacements
from ummim.data.order import Pick
from ummim.data.shards import ShardIndex, ShardReader
from ummim.errors import DataError
from ummim.masking import PlanSampler, SamplePlan
from ummim.seeds import sample_seed

_WHOLE = Box(0, 0, 1, 1)
_CANDIDATES = 2**16  # rows that the fixed images are chosen from


class Samples(Dataset):
    """Samples by pick; crop, flip and mask follow from (seed, epoch, key), a shared mask from the position.

    ``view``: a random crop, the centre (the whole short side), or the whole image squashed to a square. With
    ``attention``, the masks of random crops are drawn from the images' attention maps instead of by ``sampler``.
    Rows in ``bad`` count as unreadable without being tried. ``sparse``: for few samples of many shards, see
    ``ShardReader``.
    """

    def __init__(
        self,
        index: ShardIndex,
        data: DataConfig,
        sampler: PlanSampler,
        seed: int,
        view: View = "random",
        attention: AttentionMaps | None = None,
        bad: Container[int] = (),
        sparse: bool = False,
    ) -> None:
        self.index, self.size, self.sampler, self.seed = index, data.image_size, sampler, seed
        self.view, self.attention, self.bad = view, attention, bad
        self.augment = Augment(data)
        self.reader = ShardReader(index, sparse)
        self.gone = False  # nothing could be read: every further sample would wait for it in vain

    def __getitems__(self, picks: list[Pick]) -> Batch:
        return self.batch(picks)

    def batch(self, picks: list[Pick]) -> Batch:
        """Read, decode, crop and mask. Bad data never raises: it is replaced, and the batch's ``faults`` tell."""
        images = torch.empty(len(picks), 3, self.size, self.size, dtype=torch.uint8)
        pixels = images.numpy()  # transposing in numpy is faster: torch starts threads for it
        plans: list[SamplePlan] = []
        rows: list[int] = []
        faults: list[Fault] = []
        for i, pick in enumerate(picks):
            row, view, plan, failed = self.sound(pick)
            pixels[i] = view.numpy()
            plans.append(plan)
            rows.append(row)
            faults += failed
        labels = torch.tensor([int(self.index.table["label"][row]) for row in rows])  # (B,)
        stack = self.sampler.stack if self.attention is None else self.attention.sampler.stack
        return Batch(images, stack(plans), labels, [self.index.key(row) for row in rows], tuple(faults))

    def sound(self, pick: Pick) -> tuple[int, Tensor, SamplePlan, list[Fault]]:
        """The pick's row, view (3, S, S) uint8 and plan, or those of its first replacement that can be read.

        Where nothing can be read the view is black: this rank still takes its part in the step to the end, and
        all ranks stop after it.
        """
        failed: list[tuple[int, str]] = []
        for row in chain([pick.row], replacements(self.seed, pick.epoch, pick.row, len(self.index))):
            if self.gone:
                failed.append((row, "nothing else could be read"))
                break
            try:
                view, plan = self.masked_view(pick._replace(row=row))
            except DataError as error:
                failed.append((row, str(error).removeprefix(f"{self.reader.where(row)}: ")))
                if isinstance(error, SourceDown):
                    break
                continue
            return row, view, plan, self.faults(pick.epoch, failed, self.index.key(row))
        self.gone = True
        black = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        return pick.row, black, self.plan(pick, _WHOLE), self.faults(pick.epoch, failed, None)

    def masked_view(self, pick: Pick) -> tuple[Tensor, SamplePlan]:
        """Read, decode, crop and mask one sample. Raises ``DataError`` if it cannot be done."""
        if pick.row in self.bad:
            raise DataError("known to be bad")
        data = self.reader.read(pick.row)
        seed = sample_seed(self.seed, pick.epoch, self.index.key(pick.row))
        try:
            if self.attention is not None:
                view, box = self.augment.located_view(data, seed)
            else:
                view, box = self.augment.view(data, seed, self.view), _WHOLE
        except ValueError as error:
            raise DataError(f"the image cannot be decoded: {error}") from None
        return view, self.plan(pick, box)

    def plan(self, pick: Pick, box: Box) -> SamplePlan:
        """The mask plan of a sample whose view lies at ``box``."""
        key = self.index.key(pick.row)
        if self.attention is not None:
            return self.attention.plan(pick.row, box, sample_seed(self.seed, pick.epoch, key))
        return self.sampler(self.sampler.seed(self.seed, pick.epoch, key, pick.position))

    def faults(self, epoch: int, failed: list[tuple[int, str]], replacement: str | None) -> list[Fault]:
        """Rows that were tried for one sample, with what was wrong with each, as faults."""
        places = [self.index.table[row] for row, _ in failed]
        return [
            Fault(
                epoch, row, self.index.shards[place["shard"]].name, self.index.key(row), int(place["offset"]), reason,
                attempt, replacement,
            )
            for attempt, ((row, reason), place) in enumerate(zip(failed, places, strict=True))
        ]  # fmt: skip


def fixed_batch(index: ShardIndex, data: DataConfig, sampler: PlanSampler, seed: int, count: int) -> Batch:
    """The same images in every epoch and run, for the figures: spread over the classes, whole short side, fixed masks.

    ``count`` images, or all of them if there are fewer; they are replaced like others if they cannot be read.
    Of a large table, rows at equal distances stand for all.
    Raises ``DataError`` if nothing can be read.
    """
    samples = Samples(index, data, sampler, seed, view="centre", sparse=True)
    candidates = np.arange(min(len(index), _CANDIDATES)) * len(index) // min(len(index), _CANDIDATES)
    by_label = candidates[np.argsort(index.table["label"][candidates], kind="stable")]  # or, unlabelled, by row
    count = min(count, len(by_label))
    rows = by_label[np.arange(count) * len(by_label) // count]
    with closing(samples.reader):
        batch = samples.batch([Pick(0, row, 0) for row in rows.tolist()])
    unread = [fault for fault in batch.faults if fault.replacement is None]
    if unread:
        raise DataError(f"{index.place}: no image can be read; the first that was tried: {unread[0].reason}")
    return batch
