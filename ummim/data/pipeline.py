"""From the index to batches on the host: read, decode, augment, mask, collate, in worker processes."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ummim.data.attention import AttentionMaps
from ummim.data.augment import Augment
from ummim.data.config import DataConfig
from ummim.data.images import decode
from ummim.data.order import MicroBatches, Pick
from ummim.data.shards import ShardIndex, ShardReader
from ummim.data.workers import start_worker, supervised
from ummim.errors import DataError
from ummim.masking import MaskPlan, PlanSampler, SamplePlan, sample_seed


@dataclass
class Batch:
    """A rank's micro-batch.

    Attributes:
        images: (B, 3, S, S) uint8.
        plan: the mask plan of each image.
        labels: (B,) int64, -1 where the data has none.
        keys: the samples' keys.
    """

    images: Tensor
    plan: MaskPlan
    labels: Tensor
    keys: list[str]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            plan=self.plan.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        return replace(
            self,
            images=self.images.pin_memory(),
            plan=self.plan.pin_memory(),
            labels=self.labels.pin_memory(),
        )


class BatchPlan(Protocol):
    """The batch arithmetic that the loader needs; ``ummim.run_plan.RunPlan`` has it."""

    @property
    def micro_batch(self) -> int: ...
    @property
    def accumulation(self) -> int: ...
    @property
    def global_batch(self) -> int: ...
    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def stop_step(self) -> int: ...


class PickBatches(Protocol):
    """What to read, batch by batch; ``MicroBatches`` in training."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[list[Pick]]: ...


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
        view: Literal["random", "centre", "whole"] = "random",
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
            view, plan = self.masked_view(self.image(pick.row), pick, key)
            pixels[i] = view.numpy()
            keys.append(key)
            plans.append(plan)
        labels = torch.tensor([int(self.index.table["label"][pick.row]) for pick in picks])  # (B,)
        stack = self.sampler.stack if self.attention is None else self.attention.sampler.stack
        return Batch(images, stack(plans), labels, keys)

    def image(self, row: int) -> Image.Image:
        """Read and decode."""
        data = self.reader.read(row)
        try:
            return decode(data)
        except ValueError as error:
            raise DataError(
                f"{self.reader.where(row)}: the image cannot be decoded: {error}; "
                f"find every fault with: python -m data_prep verify {self.index.folder}"
            ) from None

    def masked_view(self, image: Image.Image, pick: Pick, key: str) -> tuple[Tensor, SamplePlan]:
        """Crop and mask: (3, S, S) uint8, and the plan."""
        seed = sample_seed(self.seed, pick.epoch, key)
        if self.attention is not None:
            view, box = self.augment.located(image, seed)
            return view, self.attention.plan(pick.row, box, seed)
        plan = self.sampler(self.sampler.seed(self.seed, pick.epoch, key, pick.position))
        if self.view == "random":
            return self.augment(image, seed), plan
        return (self.augment.centre if self.view == "centre" else self.augment.whole)(image), plan


class Loader:
    """This rank's micro-batches: for training ``accumulation`` of them for each optimizer step."""

    def __init__(self, samples: Samples, micro_batches: PickBatches, workers: int) -> None:
        self.samples, self.micro_batches, self.workers = samples, micro_batches, workers
        self.pin_memory = False  # set it for a CUDA device: batches come in page-locked memory

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches; worker processes end with the iteration, also when it is left early.

        Raises:
            DataError: a sample cannot be read (naming shard, key and byte), or a worker process was killed.
        """
        batches = iter(
            DataLoader(
                self.samples,
                batch_sampler=self.micro_batches,
                num_workers=self.workers,
                collate_fn=_as_is,
                pin_memory=self.pin_memory,
                worker_init_fn=start_worker,
                prefetch_factor=2 if self.workers else None,
                generator=torch.Generator(),  # else the DataLoader draws from, and so moves, the global one
            )
        )
        with closing(self.samples.reader), supervised(batches):
            for batch in batches:
                if isinstance(batch, DataError):
                    raise batch
                yield batch


def build_loader(
    index: ShardIndex,
    data: DataConfig,
    sampler: PlanSampler,
    seed: int,
    plan: BatchPlan,
    rank: int,
    world_size: int,
    start_step: int = 0,
    attention: AttentionMaps | None = None,
) -> Loader:
    """The training loader of one rank.

    Args:
        index: the opened shards.
        data: the recipe's data section.
        sampler: draws the mask plans.
        seed: the run's seed.
        plan: batch arithmetic (``ummim.run_plan.RunPlan``).
        rank, world_size: this process among all.
        start_step: optimizer steps already done; the next one's samples come first, nothing is replayed.
        attention: draws the mask plans from attention maps instead.

    Returns:
        An iterable of ``Batch``, ``accumulation`` of them for each optimizer step.

    Raises:
        RecipeError: an impossible value in ``data``.
        DataError: fewer samples than one global batch, or an index that does not fit the plan.
    """
    data.validate()
    if plan.accumulation * world_size * plan.micro_batch != plan.global_batch:
        raise ValueError(f"{plan.accumulation} x {world_size} x {plan.micro_batch} is not {plan.global_batch}")
    if len(index) < plan.global_batch:
        raise DataError(
            f"{index.folder} holds {len(index)} samples, fewer than one global batch of {plan.global_batch}: "
            "lower global_batch, or add images"
        )
    layout = (plan.accumulation, world_size, plan.micro_batch)
    micro_batches = MicroBatches(index, seed, data.streams, data.window, layout, rank, start_step, plan.stop_step)
    if micro_batches.steps_per_epoch != plan.steps_per_epoch:
        raise ValueError(f"{plan.steps_per_epoch} steps an epoch do not fit {len(index)} samples")
    sampler.warm_up()
    return Loader(Samples(index, data, sampler, seed, attention=attention), micro_batches, data.workers)


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


def _as_is(batch: Any) -> Any:
    return batch
