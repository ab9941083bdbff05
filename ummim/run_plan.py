"""A recipe's batch and schedule in numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunPlan:
    """A recipe's arithmetic for one world size and data set.

    Attributes:
        world_size: ranks.
        global_batch: images per optimizer step = micro_batch x accumulation x world_size.
        micro_batch: images per rank and forward pass.
        accumulation: forward passes per optimizer step.
        steps_per_epoch: optimizer steps; an epoch's incomplete last batch is dropped.
        total_steps: length of the schedule.
        stop_step: where this run ends.
        warmup_steps: steps of linear warm-up.
        lr: peak learning rate = base_lr x global_batch / reference_batch.
    """

    world_size: int
    global_batch: int
    micro_batch: int
    accumulation: int
    steps_per_epoch: int
    total_steps: int
    stop_step: int
    warmup_steps: int
    lr: float
