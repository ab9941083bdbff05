"""Memory of one rank by component, and the largest micro-batch that fits."""

from __future__ import annotations

from dataclasses import dataclass

from ummim.capacity.activations import Activations
from ummim.capacity.gpus import Assumptions
from ummim.capacity.states import persistent_elements, state_bytes
from ummim.capacity.strategy import GIB, Shapes, Strategy


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at its worst moment.

    Attributes:
        fixed: component -> bytes that are there whatever the micro-batch.
        image: component -> bytes of each image of the micro-batch.
        update: what the optimizer step takes in place of the activations, which are gone by then.
        micro_batch: images.
        available: bytes of the GPU.
        host: bytes of host memory, of offloads.
        disk: bytes of a local disk, of optimizer state there.
    """

    fixed: dict[str, float]
    image: dict[str, float]
    update: float
    micro_batch: int
    available: float
    host: float
    disk: float

    @property
    def components(self) -> dict[str, float]:
        """Component -> bytes."""
        return {**self.fixed, **{name: value * self.micro_batch for name, value in self.image.items()}}

    @property
    def total(self) -> float:
        """The larger of the passes' and the optimizer step's; states and buckets are there in both."""
        return sum(self.fixed.values()) + max(self.micro_batch * sum(self.image.values()), self.update)

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    @property
    def largest_micro_batch(self) -> int:
        """0 where not even one image fits."""
        left = self.available - sum(self.fixed.values())
        return 0 if left < self.update else int(left // sum(self.image.values()))


def rank_memory(
    shapes: Shapes,
    largest: int,
    strategy: Strategy,
    activations: Activations,
    micro_batch: int,
    image_size: int,
    world_size: int,
    available: float,
    assumed: Assumptions,
) -> Memory:
    """Memory of the fullest of ``world_size`` ranks.

    largest: elements of the largest single module. Gradients are counted whole beside all activations, as they are from
    the second accumulated micro-batch on.
    """
    ranks = range(world_size) if strategy.stage == 2 else (0,)
    states = max((state_bytes(shapes, strategy, world_size, rank) for rank in ranks), key=lambda state: state.total)
    pixels = 3 * image_size**2
    held = activations.saved + activations.working
    return Memory(
        fixed={
            "weights": states.weights,
            "gradients": states.gradients,
            "optimizer state": states.optimizer,
            "tables and frozen models": states.buffers,
            "communication buckets": bucket_bytes(strategy, shapes.trainable),
            "gathered weights": gathered_elements(shapes, largest, strategy, world_size) * strategy.weight,
            "CUDA context (assumed)": assumed.context_gib * GIB,
        },
        image={
            "saved activations": activations.saved,
            "backward pass at work": activations.working,
            "data": pixels * (1 + 4),  # uint8, and normalised in float32
            "fragmentation (assumed)": held * assumed.fragmentation,
        },
        update=update_bytes(shapes, strategy, world_size),
        micro_batch=micro_batch,
        available=available,
        host=states.host + activations.host * micro_batch,
        disk=states.disk,
    )


def bucket_bytes(strategy: Strategy, trainable: int) -> int:
    """Of the gradients' buckets, which are made whole whatever the model's size.

    Stage 3 has one bucket and a copy of what is in it, laid out by rank. Stage 0 and BF16_Optimizer reduce after the
    last backward pass (``update_bytes``).
    """
    if strategy.stage == 0 or strategy.bf16_optimizer:
        return 0
    if strategy.stage == 3:
        bucket = strategy.reduce_bucket * strategy.communicate if strategy.contiguous else 0
        return bucket + min(strategy.reduce_bucket, trainable) * strategy.communicate
    if not strategy.contiguous:
        return min(strategy.reduce_bucket, trainable) * strategy.weight
    element = strategy.accumulate if strategy.stage == 1 else strategy.weight
    return strategy.reduce_bucket * element * (2 if strategy.overlap else 1)


def gathered_elements(shapes: Shapes, largest: int, strategy: Strategy, world_size: int) -> int:
    """Elements of the weights that stage 3 has gathered at its fullest, at the end of the forward pass.

    What the backward pass needs again within ``reuse`` elements stays: the last half of that distance, which with
    DeepSpeed's default of 1e9 is the whole of a model below 500 M. Beyond that, the module at work and what is
    fetched ahead of it.
    """
    if strategy.stage != 3 or world_size == 1:
        return 0
    partitioned = sum(shapes.all) - persistent_elements(shapes, strategy)
    return min(partitioned, max(strategy.reuse // 2, largest + strategy.prefetch_bucket))


def update_bytes(shapes: Shapes, strategy: Strategy, world_size: int) -> int:
    """Of reducing after the last backward pass and of AdamW: DeepSpeed's flat copy of 16-bit gradients and its float32
    gradients where it makes them now, and the denominators that PyTorch's AdamW computes for all weights at once."""
    trained, share = shapes.trainable, -(-shapes.trainable // world_size)
    if strategy.offload_optimizer:
        return 0
    if strategy.stage == 0:
        return trained * max(strategy.weight, 4 + (0 if strategy.weight == 4 else 4))
    if strategy.bf16_optimizer:
        return max(trained * strategy.communicate, share * 4)
    return share * (4 + 4)
