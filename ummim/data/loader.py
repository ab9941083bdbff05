"""A rank's batches from its worker processes, from any step on."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from ummim.data.attention import AttentionMaps
from ummim.data.config import DataConfig
from ummim.data.order import MicroBatches, Pick
from ummim.data.prefetch import Prefetcher
from ummim.data.samples import Samples
from ummim.data.shards import ShardIndex, ShardReader
from ummim.data.workers import REMEDY, Supervised, WorkerDied, start_worker
from ummim.errors import DataError
from ummim.masking import PlanSampler

log = logging.getLogger(__name__)


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


class Reading(Protocol):
    """What makes a batch of picks; ``Samples`` in pre-training."""

    seed: int
    reader: ShardReader

    def __getitems__(self, picks: list[Pick]) -> Any: ...


class PickBatches(Protocol):
    """What to read, batch by batch, by number from 0; ``MicroBatches`` in training."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> list[Pick]: ...


class Loader:
    """This rank's micro-batches: for training ``accumulation`` of them for each optimizer step.

    Args:
        samples: reads them.
        micro_batches: what to read.
        workers: processes that read ahead; 0: the trainer does it.
        restarts: how many times dead workers are replaced by new ones.
        accumulation: micro-batches of an optimizer step.
        start_step: optimizer steps whose micro-batches are left out.
        prefetcher: makes what brings shards to the node that micro-batches from a number on will need.
    """

    def __init__(
        self,
        samples: Reading,
        micro_batches: PickBatches,
        workers: int,
        restarts: int = 0,
        accumulation: int = 1,
        start_step: int = 0,
        prefetcher: Callable[[int], Prefetcher] | None = None,
    ) -> None:
        self.samples, self.micro_batches, self.workers = samples, micro_batches, workers
        self.restarts, self.accumulation, self.prefetcher = restarts, accumulation, prefetcher
        self.position = start_step * accumulation  # the number of the next micro-batch to be handed out
        self.pin_memory = False  # set it for a CUDA device: batches come in page-locked memory

    def __len__(self) -> int:
        """Micro-batches that are left."""
        return len(self.micro_batches) - self.position

    def __iter__(self) -> Iterator[Any]:
        """Yield what is left; worker processes end with the iteration, also when it is left early.

        If a worker process dies, all are started anew with the first micro-batch that was not handed out: none is
        lost, doubled or moved.

        Raises:
            DataError: worker processes died more often than ``restarts``.
        """
        died = 0
        with closing(self.samples.reader):
            while len(self):
                try:
                    yield from self._batches()
                except WorkerDied as error:
                    died += 1
                    if died > self.restarts:
                        raise
                    log.warning("data worker %s, restarting (%d of %d): %s", error.how, died, self.restarts, REMEDY)

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands, as torchdata's StatefulDataLoader tells it: the optimizer steps that were handed
        out in full. It means the same to any number of ranks and workers, with the same shards and global batch."""
        return {"seed": self.samples.seed, "step": self.position // self.accumulation}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there; nothing is replayed. Raises ``DataError`` for the state of a run with another seed."""
        if state["seed"] != self.samples.seed:
            raise DataError(
                f"the loader's state is of a run with seed {state['seed']}, this one has {self.samples.seed}"
            )
        self.position = state["step"] * self.accumulation

    def _batches(self) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            self.samples,  # type: ignore[arg-type]  # has __getitems__ alone
            batch_sampler=map(self.micro_batches.__getitem__, range(self.position, len(self.micro_batches))),
            num_workers=self.workers,
            collate_fn=_as_is,
            pin_memory=self.pin_memory,
            worker_init_fn=start_worker,
            prefetch_factor=2 if self.workers else None,
            generator=torch.Generator(),  # else the DataLoader draws from, and so moves, the global one
        )
        with Supervised(loader) as supervised, self._prefetching() as prefetcher:
            while len(self):  # not until they end: the workers' ends would look like deaths
                batch = supervised.next()
                self.position += 1
                if prefetcher is not None:
                    prefetcher.position = self.position
                yield batch

    def _prefetching(self) -> AbstractContextManager[Prefetcher | None]:
        return nullcontext() if self.prefetcher is None else self.prefetcher(self.position)


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
        DataError: fewer samples than one global batch.
        ValueError: an index that does not fit the plan.
    """
    sampler.warm_up()
    samples = Samples(index, data, sampler, seed, attention=attention)
    return training_loader(samples, index, data, seed, plan, rank, world_size, start_step)


def training_loader(
    samples: Reading,
    index: ShardIndex,
    data: DataConfig,
    seed: int,
    plan: BatchPlan,
    rank: int,
    world_size: int,
    start_step: int = 0,
) -> Loader:
    """``build_loader`` for ``samples``, whatever they make batches of."""
    data.validate()
    if plan.accumulation * world_size * plan.micro_batch != plan.global_batch:
        raise ValueError(f"{plan.accumulation} x {world_size} x {plan.micro_batch} is not {plan.global_batch}")
    if len(index) < plan.global_batch:
        raise DataError(
            f"{index.folder} holds {len(index)} samples, fewer than one global batch of {plan.global_batch}: "
            "lower global_batch, or add images"
        )
    layout = (plan.accumulation, world_size, plan.micro_batch)
    micro_batches = MicroBatches(index, seed, data.streams, data.window, layout, rank, plan.stop_step)
    if micro_batches.steps_per_epoch != plan.steps_per_epoch:
        raise ValueError(f"{plan.steps_per_epoch} steps an epoch do not fit {len(index)} samples")
    ahead = 2 * data.streams * data.window  # the shards in use, and the next of each stream

    def prefetcher(position: int) -> Prefetcher:
        return Prefetcher(index, micro_batches.upcoming_shards, ahead, position)

    return Loader(samples, micro_batches, data.workers, data.worker_restarts, plan.accumulation, start_step, prefetcher)


def _as_is(batch: Any) -> Any:
    return batch
