"""How long an optimizer step takes, and what becomes of that on more nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ummim.capacity.activations import Activations
from ummim.capacity.communication import Collective, seconds
from ummim.capacity.failures import expected_maximum
from ummim.capacity.gpus import Assumptions, Gpu

if TYPE_CHECKING:
    from ummim.run_plan import RunPlan


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on an average rank.

    Attributes:
        compute: forward and backward passes, with recomputation.
        communication: all collectives, hidden or not.
        exposed: the part of them that computation does not hide.
        offload: to and from host memory or a disk, and AdamW there.
        straggling: waiting for the slowest rank.
        global_batch: images of the step.
    """

    compute: float
    communication: float
    exposed: float
    offload: float
    straggling: float
    global_batch: int

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.offload + self.straggling

    @property
    def images_per_second(self) -> float:
        """Of all ranks."""
        return self.global_batch / self.total


def step_time(
    activations: Activations,
    plan: RunPlan,
    found: list[Collective],
    offloaded: float,
    nodes: int,
    gpu: Gpu,
    peak: float,
    assumed: Assumptions,
    on_disk: float = 0,
) -> StepTime:
    """Model of a step.

    A pass takes its FLOPs at ``assumed.efficiency`` of ``peak``, and no less than its operators take to launch. What
    overlaps is hidden behind its own pass, but for the last call, which has nothing left to hide behind; the rest is
    waited for. Input and output outside the collectives, and the optimizer step on a GPU (some milliseconds), are left
    out. ``offloaded``: bytes of optimizer state on the host for each rank; ``on_disk``: bytes of its swap files.
    """
    per_node = plan.world_size // nodes
    flops = activations.flops * plan.micro_batch / (peak * assumed.efficiency)
    one = max(flops, activations.operators * assumed.launch_microseconds * 1e-6)
    forward = activations.forward_flops / activations.flops
    passes = {"forward": one * forward, "backward": one * (1 - forward), "step": 0.0}
    total = exposed = 0.0
    for phase, length in passes.items():
        beside = last = 0.0
        times = 1
        for collective in (c for c in found if c.phase == phase):
            took = seconds(collective, nodes, per_node, gpu, assumed)
            total += took * collective.passes
            if collective.overlaps:
                beside, last = beside + took, max(last, took / collective.calls)
                times = collective.passes
            else:
                exposed += took * collective.passes
        exposed += max(beside - length, last) * times
    busy = one * plan.accumulation + exposed
    offload = _offload(activations, plan, offloaded, per_node, assumed)
    offload += 2 * on_disk * per_node / (assumed.disk_gbytes * 1e9)  # written and read
    straggling = (busy + offload) * assumed.step_noise * expected_maximum(plan.world_size)
    return StepTime(one * plan.accumulation, total, exposed, offload, straggling, plan.global_batch)


HOST_MEMORY = 200e9  # bytes/s of a node's memory (assumed), which AdamW on the host reads and writes


def _offload(activations: Activations, plan: RunPlan, offloaded: float, per_node: int, assumed: Assumptions) -> float:
    """Block inputs to the host and back in each pass; gradients down, AdamW there (28 bytes of traffic for the 16 of a
    weight), weights up. Nothing hides it."""
    inputs = 2 * activations.host * plan.micro_batch * plan.accumulation
    weights = offloaded / 16 * (4 + 2)
    update = offloaded / 16 * 28 * per_node / HOST_MEMORY
    return (inputs + weights) / (assumed.pcie_gbytes * 1e9) + update
