"""Picks in, batches out, in one process: read, decode, augment, mask, collate."""

from collections.abc import Container
from contextlib import closing

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ummim.data.attention import AttentionMaps
from ummim.data.augment import Augment, Box, View
from ummim.data.batch import Batch
from ummim.data.config import DataConfig
from ummim.data.faults import Fault
from ummim.data.order import Pick
from ummim.data.shards import ShardIndex
from ummim.data.sound import SoundRows
from ummim.errors import DataError
from ummim.masking import MaskPlan, PlanSampler
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
        self.view, self.attention = view, attention
        self.augment = Augment(data)
        self.rows = SoundRows(index, seed, bad, sparse)
        self.reader = self.rows.reader

    def __getitems__(self, picks: list[Pick]) -> Batch:
        return self.batch(picks)

    def batch(self, picks: list[Pick]) -> Batch:
        """Read, decode, crop and mask. Bad data never raises: it is replaced, and the batch's ``faults`` tell."""
        pixels = np.empty((len(picks), self.size, self.size, 3), np.uint8)  # as views have them; see ``Batch``
        found: list[Pick] = []
        boxes: list[Box] = []
        faults: list[Fault] = []
        for i, pick in enumerate(picks):
            row, made, failed = self.rows.sound(pick, self._view)
            view, box = (None, _WHOLE) if made is None else made
            pixels[i] = 0 if view is None else view.permute(1, 2, 0).numpy()  # black: nothing could be read
            found.append(pick._replace(row=row))
            boxes.append(box)
            faults += failed
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        labels = torch.tensor([int(self.index.table["label"][pick.row]) for pick in found])  # (B,)
        keys = [self.index.key(pick.row) for pick in found]
        return Batch(images, self._plan(found, keys, boxes), labels, keys, tuple(faults))

    def _view(self, data: bytes, pick: Pick) -> tuple[Tensor, Box]:
        """Decode and crop one sample. Raises ``ValueError`` if the bytes are no image."""
        seed = sample_seed(self.seed, pick.epoch, self.index.key(pick.row))
        if self.attention is not None:
            return self.augment.located_view(data, seed)
        return self.augment.view(data, seed, self.view), _WHOLE

    def _plan(self, picks: list[Pick], keys: list[str], boxes: list[Box]) -> MaskPlan:
        """The mask plan of samples whose views lie at ``boxes``."""
        samples = list(zip(picks, keys, strict=True))
        if self.attention is None:
            seeds = [self.sampler.seed(self.seed, pick.epoch, key, pick.position) for pick, key in samples]
            return self.sampler.batch(seeds)
        plans = [
            self.attention.plan(pick.row, box, sample_seed(self.seed, pick.epoch, key))
            for (pick, key), box in zip(samples, boxes, strict=True)
        ]
        return self.attention.sampler.stack(plans)


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
