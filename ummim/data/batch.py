"""What a training step gets from the loader."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ummim.data.faults import Fault
from ummim.masking import MaskPlan


@dataclass
class Batch:
    """A rank's micro-batch.

    Attributes:
        images: (B, 3, S, S) uint8.
        plan: the mask plan of each image.
        labels: (B,) int64, -1 where the data has none.
        keys: the samples' keys.
        faults: the samples that could not be read; in their places are others, see ``replacements``.
    """

    images: Tensor
    plan: MaskPlan
    labels: Tensor
    keys: list[str]
    faults: tuple[Fault, ...] = ()

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
