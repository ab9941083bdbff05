"""Picks in, batches out, in one process: read, decode, augment, mask, collate."""

from contextlib import closing

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ummim.data.attention import AttentionMaps
from ummim.data.augment import Augment, View
from ummim.data.batch import Batch
from ummim.data.config import DataConfig
from ummim.data.order import Pick
from ummim.data.shards import ShardIndex, ShardReader
from ummim.errors import DataError
from ummim.masking import PlanSampler, SamplePlan, sample_seed


class Samples(Dataset):
    """Samples by pick; crop, flip and mask follow from (seed, epoch, key), a shared mask from the position.

    ``view``: a random crop, the centre (the whole short side), or the whole image squashed to a square. With
    ``attention``, the masks of random crops are drawn from the images' attention maps instead of by ``sampler``.
    """

    def __init__(
        self,
        index: ShardIndex,
        data: DataConfig,
        sampler: PlanSampler,
        seed: int,
        view: View = "random",
        attention: AttentionMaps | None = None,
    ) -> None:
        self.index, self.size, self.sampler, self.seed = index, data.image_size, sampler, seed
        self.view, self.attention = view, attention
        self.augment = Augment(data)
        self.reader = ShardReader(index)

    def __getitems__(self, picks: list[Pick]) -> Batch | DataError:
        """A batch, or the error that kept it from being read: an exception raised in a worker process would
        reach the user wrapped in that process's traceback."""
        try:
            return self.batch(picks)
        except DataError as error:
            return error

    def batch(self, picks: list[Pick]) -> Batch:
        """Read, decode, crop and mask."""
        images = torch.empty(len(picks), 3, self.size, self.size, dtype=torch.uint8)
        pixels = images.numpy()  # transposing in numpy is faster: torch starts threads for it
        keys, plans = [], []
        for i, pick in enumerate(picks):
            key = self.index.key(pick.row)
            view, plan = self.masked_view(pick, key)
            pixels[i] = view.numpy()
            keys.append(key)
            plans.append(plan)
        labels = torch.tensor([int(self.index.table["label"][pick.row]) for pick in picks])  # (B,)
        stack = self.sampler.stack if self.attention is None else self.attention.sampler.stack
        return Batch(images, stack(plans), labels, keys)

    def masked_view(self, pick: Pick, key: str) -> tuple[Tensor, SamplePlan]:
        """Read, decode, crop and mask: (3, S, S) uint8, and the plan."""
        data, seed = self.reader.read(pick.row), sample_seed(self.seed, pick.epoch, key)
        try:
            if self.attention is not None:
                view, box = self.augment.located_view(data, seed)
                return view, self.attention.plan(pick.row, box, seed)
            view = self.augment.view(data, seed, self.view)
        except ValueError as error:
            raise DataError(
                f"{self.reader.where(pick.row)}: the image cannot be decoded: {error}; "
                f"find every fault with: python -m data_prep verify {self.index.folder}"
            ) from None
        return view, self.sampler(self.sampler.seed(self.seed, pick.epoch, key, pick.position))


def fixed_batch(index: ShardIndex, data: DataConfig, sampler: PlanSampler, seed: int, count: int) -> Batch:
    """The same images in every epoch and run, for the figures: spread over the classes, whole short side, fixed masks.

    ``count`` images, or all of them if there are fewer. Raises ``DataError`` like the loader.
    """
    samples = Samples(index, data, sampler, seed, view="centre")
    count = min(count, len(index))
    by_label = np.argsort(index.table["label"], kind="stable")  # unlabelled: the order of the table
    rows = by_label[np.arange(count) * len(index) // count]
    with closing(samples.reader):
        return samples.batch([Pick(0, row, 0) for row in rows.tolist()])
