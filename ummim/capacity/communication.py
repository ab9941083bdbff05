"""The collectives of one optimizer step, and how long they take.

Volumes as a ring sends them: of a tensor of B bytes on W ranks each rank sends 2 (W - 1) / W B for an all-reduce and
(W - 1) / W B for a reduce, a reduce-scatter or an all-gather (Patarasuk and Yuan, 2009). tests/capacity counts them in
a real step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ummim.capacity.gpus import Assumptions, Gpu
from ummim.capacity.strategy import Shapes, Strategy

ELEMENTS_OF_ONE_CALL = 500_000_000  # of DeepSpeed's all-reduce without ZeRO


@dataclass(frozen=True)
class Collective:
    """Calls of one kind within one optimizer step.

    Attributes:
        kind: the operation.
        phase: when it runs: in a ``forward`` or ``backward`` pass, beside its computation where it overlaps, or at the
            ``step``.
        size: bytes of the whole tensors of all calls, of one pass or step.
        calls: of one pass or step.
        passes: times that this happens in an optimizer step: 1, or once for each accumulated micro-batch.
        overlaps: it runs beside computation.
    """

    kind: Literal["all-reduce", "reduce", "reduce-scatter", "all-gather"]
    phase: Literal["forward", "backward", "step"]
    size: int
    calls: int
    passes: int = 1
    overlaps: bool = False

    def sent(self, world_size: int) -> float:
        """Bytes that a rank sends in a pass or step."""
        return (2 if self.kind == "all-reduce" else 1) * (world_size - 1) / world_size * self.size


def collectives(shapes: Shapes, strategy: Strategy, world_size: int, accumulation: int) -> list[Collective]:
    """Of one optimizer step; single numbers (norms, the loss) are left out."""
    if world_size == 1:
        return []
    trained = shapes.trainable
    flat = sum(-(-sum(group) // (2 * world_size)) * 2 * world_size for group in shapes.groups)
    updated = Collective("all-gather", "step", flat * strategy.weight, len(shapes.groups))
    if strategy.stage == 0 or strategy.bf16_optimizer:
        calls = math.ceil(trained / ELEMENTS_OF_ONE_CALL)
        reduced = Collective("all-reduce", "step", trained * strategy.communicate, calls)
        return [reduced] if strategy.stage == 0 else [reduced, updated]
    calls = math.ceil(trained / strategy.reduce_bucket)
    if strategy.stage == 1:
        return [Collective("all-reduce", "step", trained * strategy.communicate, calls), updated]
    if strategy.stage == 2:
        kind: Literal["all-reduce", "reduce"] = "all-reduce" if strategy.all_reduce else "reduce"
        calls = calls if strategy.all_reduce else calls + world_size
        size = trained * strategy.communicate
        return [Collective(kind, "backward", size, calls, accumulation, strategy.overlap), updated]
    return _stage_3(shapes, strategy, world_size, accumulation)


def _stage_3(shapes: Shapes, strategy: Strategy, world_size: int, accumulation: int) -> list[Collective]:
    """Each pass gathers what is not whole on every rank; the backward pass only what the forward pass let go."""

    def padded(sizes: list[int]) -> int:
        return sum(-(-numel // world_size) * world_size for numel in sizes)

    parts = [numel for numel in shapes.all if numel > strategy.persistent]
    size = padded(parts) * strategy.weight
    calls = math.ceil(sum(parts) / max(1, strategy.prefetch_bucket)) + 1
    gone = 1 - min(1.0, strategy.reuse / 2 / max(1, sum(parts)))  # not kept for the backward pass
    trained = padded([numel for group in shapes.groups for numel in group])
    small = [numel for numel in shapes.all if numel <= strategy.persistent]
    buckets = math.ceil(shapes.trainable / strategy.reduce_bucket)
    found = [
        Collective("all-gather", "forward", size, calls, accumulation, strategy.overlap),
        Collective("all-gather", "backward", round(size * gone), round(calls * gone), accumulation, strategy.overlap),
        Collective(
            "reduce-scatter", "backward", trained * strategy.communicate, buckets, accumulation, strategy.overlap
        ),
        Collective("all-gather", "step", padded(small) * strategy.weight, len(small)),  # one by one, after the update
    ]
    return [collective for collective in found if collective.size]


def seconds(collective: Collective, nodes: int, per_node: int, gpu: Gpu, assumed: Assumptions) -> float:
    """One pass's or step's time of a collective.

    Bandwidth: each GPU's ring leaves the node through the GPU's own port, so a node sends what a rank sends, and the
    slower of link and network bounds it. Latency: an all-reduce goes up and down a tree of all ranks; the others pass
    around a ring.
    """
    world = nodes * per_node
    bandwidth = min(gpu.link if per_node > 1 else math.inf, gpu.network if nodes > 1 else math.inf)
    inside, between = assumed.link_microseconds * 1e-6, assumed.network_microseconds * 1e-6
    if collective.kind == "all-reduce":
        latency = 2 * (math.ceil(math.log2(per_node)) * inside + math.ceil(math.log2(nodes)) * between)
    else:
        latency = (world - nodes) * inside + (nodes if nodes > 1 else 0) * between
    return collective.sent(world) / (bandwidth * assumed.link_efficiency) + collective.calls * latency
