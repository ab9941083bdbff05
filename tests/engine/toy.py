"""A tiny task, recipe and loader: what the engine needs of them, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ummim.data import DataConfig
from ummim.data.faults import Fault
from ummim.engine.bad_steps import BadStepConfig
from ummim.engine.optim import OptimConfig
from ummim.engine.trainer import TaskOutput


@dataclass(frozen=True)
class _ToyRecipe:
    name: str = "toy"
    output: str = "toy"
    seed: int = 0
    log_every: int = 1
    checkpoint_every: int = 0
    checkpoint_async: bool = True
    keep_checkpoints: int = 3
    milestone_every: int = 0
    zero_stage: int = 0
    precision: str = "fp32"
    reduce_precision: str | None = None
    activation_checkpointing: str = "none"
    ds_config: str | None = None
    data: DataConfig = DataConfig("toy")
    bad_steps: BadStepConfig = BadStepConfig()
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(base_lr=1e-3, warmup_epochs=1))
    tensorboard: bool = False
    wandb: str | None = None
    resume: str = "auto"
    hang_seconds: float = 40
    compile: bool = False


@dataclass(frozen=True)
class _ToyPlan:
    world_size: int = 2
    micro_batch: int = 2
    accumulation: int = 2
    steps_per_epoch: int = 4
    total_steps: int = 12
    stop_step: int = 10
    warmup_steps: int = 3
    lr: float = 2e-3

    @property
    def global_batch(self) -> int:
        return self.world_size * self.micro_batch * self.accumulation


# Stand-ins for Recipe and RunPlan: the engine reads these fields alone.
ToyRecipe: Any = _ToyRecipe
ToyPlan: Any = _ToyPlan


@dataclass
class ToyBatch:
    images: Tensor  # (B, 3, 16, 16) float32
    keys: list[str]
    faults: tuple[Fault, ...] = ()

    def to(self, device: torch.device, non_blocking: bool = False) -> ToyBatch:
        return replace(self, images=self.images.to(device, non_blocking=non_blocking))

    def save(self, path: Path, told: Mapping[str, Any]) -> None:
        save_file({"images": self.images}, path, {name: str(value) for name, value in told.items()})


class ToyTask(nn.Module):
    """Reconstruct an image from its ViT tokens; with dropout, drop-path, a frozen table and a buffer."""

    def __init__(self, dropout: float = 0.1, weight: float = 1.0, width: int = 32) -> None:
        super().__init__()
        self.vit = VisionTransformer(
            img_size=16, patch_size=8, embed_dim=width, depth=2, num_heads=2, num_classes=0,
            drop_rate=dropout, drop_path_rate=dropout,
        )  # fmt: skip
        self.head = nn.Linear(width, 192)
        self.table = nn.Parameter(torch.linspace(0.1, 0.7, width), requires_grad=False)
        self.register_buffer("scale", torch.tensor(1.25))
        self.weight = weight

    def blocks(self) -> list[nn.Module]:
        return list(self.vit.blocks)

    def forward(self, batch: ToyBatch) -> TaskOutput:
        tokens = self.vit.forward_features(batch.images.to(self.head.weight.dtype)) + self.table  # (B, 5, width)
        prediction = self.head(tokens[:, 1:]).float()  # (B, 4, 192)
        target = batch.images.unfold(2, 8, 8).unfold(3, 8, 8).reshape(len(batch.images), 4, 192)
        loss = ((prediction - target) ** 2).mean() * self.scale * self.weight
        return TaskOutput(loss, {"spread": prediction.detach().std()})


def build_toy(seed: int = 0, **sizes: Any) -> ToyTask:
    torch.manual_seed(seed)
    return ToyTask(**sizes)


def toy_batches(plan: Any, rank: int, done: int = 0) -> Iterator[ToyBatch]:
    """This rank's micro-batches from optimizer step ``done`` on: a pure function of (step, index, rank)."""
    for step in range(done, plan.stop_step):
        for index in range(plan.accumulation):
            number = (step * plan.accumulation + index) * plan.world_size + rank
            generator = torch.Generator().manual_seed(number)
            images = torch.rand(plan.micro_batch, 3, 16, 16, generator=generator)
            yield ToyBatch(images, [f"sample-{number * plan.micro_batch + i}" for i in range(plan.micro_batch)])
