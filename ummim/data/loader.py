"""A rank's batches from its worker processes, from any step on."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from ummim.data.attention import AttentionMaps
from ummim.data.batch import Batch
from ummim.data.config import DataConfig
from ummim.data.order import MicroBatches, Pick
from ummim.data.samples import Samples
from ummim.data.shards import ShardIndex
from ummim.data.workers import start_worker, supervised
from ummim.errors import DataError
from ummim.masking import PlanSampler


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


def _as_is(batch: Any) -> Any:
    return batch
