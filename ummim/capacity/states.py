"""Bytes that one rank holds of weights, gradients and optimizer state: exact, as DeepSpeed 0.19.8 lays them out.

Source: "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5, for the principle; for the
rest DeepSpeed's code: what is padded, and what is kept whole or twice. tests/capacity counts the engine's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from ummim.capacity.strategy import Shapes, Strategy


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank's GPU, and those of them that an offload moves to its host.

    Attributes:
        weights: of the model's precision, with frozen ones and, at stage 3, the small ones kept whole.
        gradients: between two micro-batches of a step; with stage 1 there are fewer after the last one.
        optimizer: AdamW's moments, and the copy of the weights that it updates.
        buffers: fixed tables and a frozen teacher, whole on every rank.
        host: weights, gradients and optimizer state that wait in host memory, and buffers that swap files pass through.
        disk: optimizer state and gradients in swap files.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    host: int = 0
    disk: int = 0

    @property
    def total(self) -> int:
        """On the GPU."""
        return self.weights + self.gradients + self.optimizer + self.buffers


def state_bytes(shapes: Shapes, strategy: Strategy, world_size: int, rank: int = 0) -> StateBytes:
    """State of a model on one of ``world_size`` ranks, from the second optimizer step on.

    Single numbers (a loss scale, AdamW's step counters) are not counted.
    """
    if strategy.stage == 3:
        return _stage_3(shapes, strategy, world_size)
    trained, weight = shapes.trainable, strategy.weight
    frozen = sum(shapes.frozen) * weight
    if strategy.stage == 0:
        master = 0 if weight == 4 else 4
        return StateBytes(trained * weight + frozen, trained * weight, trained * (master + 8), shapes.buffers)
    flat = sum(_aligned(sum(group), 2 * world_size) for group in shapes.groups)  # each group is padded
    share = flat // world_size
    gradients = trained * weight  # stage 1: whole, until the step
    if strategy.bf16_optimizer:
        gradients += flat * 4
    elif strategy.stage == 2:
        separate = strategy.accumulate != weight
        gradients = share * strategy.accumulate if separate else _straddling(shapes, world_size, rank) * weight
    elif strategy.accumulate != weight:
        gradients = trained * strategy.accumulate
    if strategy.offload_optimizer:  # gradients pass to the host, in float32, as they are reduced
        return StateBytes(flat * weight + frozen, 0, 0, shapes.buffers, host=share * (12 + 4))
    return StateBytes(flat * weight + frozen, gradients, share * 12, shapes.buffers)


def _stage_3(shapes: Shapes, strategy: Strategy, world_size: int) -> StateBytes:
    """Every parameter is cut into equal parts, the last one padded; alone, a rank's part is the parameter itself."""
    share = sum(-(-numel // world_size) for group in shapes.groups for numel in group)
    frozen = sum(-(-numel // world_size) for numel in shapes.frozen)
    parts = (share + frozen) * strategy.weight
    whole = persistent_elements(shapes, strategy) * strategy.weight if world_size > 1 else 0
    gradients, optimizer, host, disk = share * strategy.accumulate, share * 12, 0, 0
    if strategy.swapping is not None:
        swapped = strategy.swapping.bytes([-(-numel // world_size) for numel in group] for group in shapes.groups)
        host, gradients, optimizer, disk = gradients + swapped.kept + swapped.locked, 0, 0, swapped.files
    elif strategy.offload_optimizer:
        host, gradients, optimizer = gradients + optimizer, 0, 0
    if strategy.offload_weights:
        host, parts = host + parts, 0
    return StateBytes(parts + whole, gradients, optimizer, shapes.buffers, host, disk)


def persistent_elements(shapes: Shapes, strategy: Strategy) -> int:
    """Elements of the parameters that stage 3 keeps whole: fetching so small ones would take longer than computing."""
    return sum(numel for numel in shapes.all if numel <= strategy.persistent)


def _aligned(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple


def _straddling(shapes: Shapes, world_size: int, rank: int) -> int:
    """Elements of all parameters that reach into the rank's share: DeepSpeed's buffer takes the whole of each."""
    total = 0
    for group in shapes.groups:
        share = _aligned(sum(group), 2 * world_size) // world_size
        start, end = rank * share, (rank + 1) * share
        offset = 0
        for numel in group:
            if offset < end and offset + numel > start:
                total += numel
            offset += numel
    return total
