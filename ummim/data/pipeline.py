"""From the index to batches on the host: read, decode, augment, mask, collate, in worker processes."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ummim.data.augment import Augment
from ummim.data.config import DataConfig
from ummim.data.images import decode
from ummim.data.order import MicroBatches
from ummim.data.shards import ShardIndex, ShardReader
from ummim.data.workers import start_worker, supervised
from ummim.errors import DataError
from ummim.masking import MaskPlan, PlanSampler, sample_seed


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


class Samples(Dataset):
    """Training samples by (epoch, row of the table); crop, flip and mask follow from (seed, epoch, key)."""

    def __init__(self, index: ShardIndex, data: DataConfig, sampler: PlanSampler, seed: int) -> None:
        self.index, self.size, self.sampler, self.seed = index, data.image_size, sampler, seed
        self.augment = Augment(data)
        self.reader = ShardReader(index)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> Batch | DataError:
        """A batch, or the error that kept it from being read: an exception raised in a worker process would
        reach the user wrapped in that process's traceback."""
        try:
            return self.batch(pairs)
        except DataError as error:
            return error

    def batch(self, pairs: list[tuple[int, int]], centre: bool = False) -> Batch:
        """Read, decode, crop and mask; ``centre`` takes the whole short side instead of a random crop."""
        images = torch.empty(len(pairs), 3, self.size, self.size, dtype=torch.uint8)
        pixels = images.numpy()  # transposing in numpy is faster: torch starts threads for it
        keys, plans = [], []
        for i, (epoch, row) in enumerate(pairs):
            data = self.reader.read(row)
            key = self.index.key(row)
            seed = sample_seed(self.seed, epoch, key)
            try:
                image = decode(data)
            except ValueError as error:
                raise DataError(
                    f"{self.reader.where(row)}: the image cannot be decoded: {error}; "
                    f"find every fault with: python -m data_prep verify {self.index.folder}"
                ) from None
            view = self.augment.centre(image) if centre else self.augment(image, seed)
            pixels[i] = view.numpy()
            keys.append(key)
            plans.append(self.sampler(seed))
        labels = torch.tensor([int(self.index.table["label"][row]) for _, row in pairs])  # (B,)
        return Batch(images, self.sampler.stack(plans), labels, keys)


class Loader:
    """This rank's micro-batches from ``start_step`` to ``stop_step``, ``accumulation`` for each step."""

    def __init__(self, samples: Samples, micro_batches: MicroBatches, workers: int) -> None:
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
    return Loader(Samples(index, data, sampler, seed), micro_batches, data.workers)


def fixed_batch(index: ShardIndex, data: DataConfig, sampler: PlanSampler, seed: int, count: int) -> Batch:
    """The same images in every epoch and run, for the figures: spread over the classes, whole short side, fixed masks.

    ``count`` images, or all of them if there are fewer. Raises ``DataError`` like the loader.
    """
    samples = Samples(index, data, sampler, seed)
    count = min(count, len(index))
    by_label = np.argsort(index.table["label"], kind="stable")  # unlabelled: the order of the table
    rows = by_label[np.arange(count) * len(index) // count]
    with closing(samples.reader):
        return samples.batch([(0, row) for row in rows.tolist()], centre=True)


def _as_is(batch: Any) -> Any:
    return batch
