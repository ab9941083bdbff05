"""Labelled images, without masks: a rank's batches for training and for evaluation."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ummim.data.augment_labelled import LabelledAugment
from ummim.data.batch import read_tensors, write_tensors
from ummim.data.config import DataConfig, LabelledDataConfig
from ummim.data.faults import Fault
from ummim.data.loader import BatchPlan, Loader, training_loader
from ummim.data.order import Pick, RowBatches
from ummim.data.prefetch import Prefetcher
from ummim.data.shards import ShardIndex
from ummim.data.sound import SoundRows
from ummim.errors import DataError
from ummim.seeds import sample_seed


@dataclass
class LabelledBatch:
    """A rank's micro-batch.

    Attributes:
        images: (B, 3, S, S) uint8.
        labels: (B,) int64.
        keys: the samples' keys.
        mixing: of its optimizer step: the seed of how images are mixed, the same on every rank.
        faults: the samples that could not be read; in their places are others, see ``replacements``.
    """

    images: Tensor
    labels: Tensor
    keys: list[str]
    mixing: str = ""
    faults: tuple[Fault, ...] = ()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "LabelledBatch":
        images, labels = (each.to(device, non_blocking=non_blocking) for each in (self.images, self.labels))
        return replace(self, images=images, labels=labels)

    def pin_memory(self) -> "LabelledBatch":
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())

    def save(self, path: Path, told: Mapping[str, Any]) -> None:
        """Write it as safetensors, in one step; keys, ``mixing`` and ``told`` (plain values) are in the metadata."""
        tensors = {"images": self.images, "labels": self.labels}
        write_tensors(path, tensors, {**told, "keys": self.keys, "mixing": self.mixing})

    @staticmethod
    def load(path: Path) -> "tuple[LabelledBatch, dict[str, Any]]":
        """A batch that ``save`` wrote, and its metadata.

        Raises:
            OSError, SafetensorError: the file cannot be read.
            KeyError, ValueError: it is not such a file.
        """
        tensors, told = read_tensors(path, ("images", "labels"))
        return LabelledBatch(tensors["images"], tensors["labels"], told["keys"], told["mixing"]), told


class LabelledSamples(Dataset):
    """Samples by pick. Training views follow from (seed, epoch, key); an evaluation's from the image alone.

    Args:
        index: the opened shards.
        data: how images are read.
        seed: the run's.
        global_batch: images of an optimizer step; None: for evaluation.
        bad, sparse: see ``SoundRows``.
    """

    def __init__(
        self,
        index: ShardIndex,
        data: LabelledDataConfig,
        seed: int,
        global_batch: int | None,
        bad: Container[int] = (),
        sparse: bool = False,
    ) -> None:
        self.index, self.size, self.seed, self.global_batch = index, data.image_size, seed, global_batch
        self.augment = LabelledAugment(data)
        self.rows = SoundRows(index, seed, bad, sparse)
        self.reader = self.rows.reader

    def __getitems__(self, picks: list[Pick]) -> LabelledBatch:
        images = torch.zeros(len(picks), 3, self.size, self.size, dtype=torch.uint8)  # black: nothing could be read
        rows: list[int] = []
        faults: list[Fault] = []
        for image, pick in zip(images, picks, strict=True):
            row, view, failed = self.rows.sound(pick, self._view)
            if view is not None:
                image.numpy()[:] = view.numpy()
            rows.append(row)
            faults += failed
        labels = torch.tensor([int(self.index.table["label"][row]) for row in rows])  # (B,)
        keys = [self.index.key(row) for row in rows]
        mixing = ""
        if self.global_batch is not None:
            mixing = f"{self.seed} mixing {picks[0].epoch} {picks[0].position // self.global_batch}"
        return LabelledBatch(images, labels, keys, mixing, tuple(faults))

    def _view(self, data: bytes, pick: Pick) -> Tensor:
        if self.global_batch is None:
            return self.augment.eval_view(data)
        return self.augment.train_view(data, sample_seed(self.seed, pick.epoch, self.index.key(pick.row)))


def build_labelled_loader(
    index: ShardIndex,
    data: LabelledDataConfig,
    seed: int,
    plan: BatchPlan,
    rank: int,
    world_size: int,
    start_step: int = 0,
) -> Loader:
    """The training loader of one rank: ``LabelledBatch``es; see ``build_loader``."""
    samples = LabelledSamples(index, data, seed, plan.global_batch)
    return training_loader(samples, index, data, seed, plan, rank, world_size, start_step)


def build_eval_loader(index: ShardIndex, data: LabelledDataConfig, batch: int, rank: int, world_size: int) -> Loader:
    """This rank's part of all images in the order of the table, batch by batch, rank after rank.

    Batch number n of the data is the same for any number of ranks, the last one filled up with its last image; ranks
    without a batch of their own at the end get that image too (``RowBatches``). Shards behind a URL are fetched ahead.
    """
    samples = LabelledSamples(index, data, 0, None)
    rows = RowBatches(index.first, batch, rank, world_size)
    prefetcher = partial(Prefetcher, index, rows.upcoming_shards, 2 * data.streams * data.window)
    return Loader(samples, rows, data.workers, data.worker_restarts, prefetcher=prefetcher)


def open_labelled(data: DataConfig, shards: str, classes: int | None, what: str) -> ShardIndex:
    """Open and check labelled ``shards`` beside those of ``data``; ``what`` named them. Raises DataError."""
    try:
        index = ShardIndex.open(shards, replace(data, shards=shards).shard_cache())
        index.check()
    except DataError as error:
        raise DataError(f"{what}: {error}") from None
    check_labels(index, classes, what)
    return index


def check_labels(index: ShardIndex, classes: int | None, what: str) -> None:
    """Raise ``DataError`` unless every sample has a label from 0 to ``classes`` - 1, or of any size where that is None.

    ``what``: the recipe's key.
    """
    labels = index.table["label"]
    if len(labels) == 0:
        raise DataError(f"{what}: {index.place} holds no images")
    least, most = int(labels.min()), int(labels.max())
    if least < 0:
        raise DataError(
            f"{what}: {index.place} has images without a label: build the shards from folders named after classes, or "
            "from a source with labels"
        )
    if classes is not None and most >= classes:
        raise DataError(
            f"{what}: {index.place} has labels up to {most}: set classify.classes={most + 1}, or use other shards"
        )
