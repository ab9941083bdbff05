"""What a training step gets from the loader."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ummim.data.faults import Fault
from ummim.masking import MaskPlan

PARTS = ("visible", "secondary", "kept", "thrown")  # of a plan


@dataclass
class Batch:
    """A rank's micro-batch.

    Attributes:
        images: (B, 3, S, S) uint8. As the loader makes them, a pixel's colours lie side by side in memory (channels
            last), so that views are copied as they are; ``normalise`` puts colours apart, on the device.
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

    def save(self, path: Path, told: Mapping[str, Any]) -> None:
        """Write images, labels and the plan's ids as safetensors, in one step; keys, grid and ``told`` (plain values)
        are in the file's metadata, as JSON."""
        tensors = {part: getattr(self.plan, part) for part in PARTS}
        tensors |= {"images": self.images, "labels": self.labels}
        plan = {"grid": self.plan.grid, "compact": self.plan.compact, "shared": self.plan.shared is not None}
        write_tensors(path, tensors, {**told, "keys": self.keys, **plan})

    @staticmethod
    def load(path: Path) -> "tuple[Batch, dict[str, Any]]":
        """A batch that ``save`` wrote, and its metadata.

        Raises:
            OSError, SafetensorError: the file cannot be read.
            KeyError, ValueError: it is not such a file.
        """
        tensors, told = read_tensors(path, (*PARTS, "images", "labels"))
        parts = {part: tensors[part] for part in PARTS}
        shared = tuple(parts["visible"][0].tolist()) if told["shared"] else None
        plan = MaskPlan(tuple(told["grid"]), **parts, compact=told["compact"], shared=shared)
        return Batch(tensors["images"], plan, tensors["labels"], told["keys"]), told


def read_tensors(path: Path, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of ``names`` in a file of ``write_tensors``, and its metadata.

    Raises:
        OSError, SafetensorError: the file cannot be read.
        KeyError, ValueError: it is not such a file.
    """
    with safe_open(path, "pt") as file:
        told = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
        return {name: file.get_tensor(name) for name in names}, told


def write_tensors(path: Path, tensors: dict[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write safetensors in one step; plain ``values`` are in the metadata, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, partial, {name: json.dumps(value) for name, value in values.items()})
    shutil.copymode(path.parent, partial)  # safetensors makes its files private
    partial.chmod(partial.stat().st_mode & 0o666)
    partial.replace(path)
