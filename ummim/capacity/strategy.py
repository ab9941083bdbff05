"""What DeepSpeed's configuration says about memory and communication, and the sizes of a model's parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ummim.engine.nvme import Swapping
from ummim.engine.optim import parameter_groups
from ummim.engine.zero import deepspeed_config

if TYPE_CHECKING:
    from ummim.run_config import RunConfig
    from ummim.run_plan import RunPlan

GIB = 2**30
Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shapes:
    """Elements of every parameter of a model.

    Attributes:
        groups: of each trainable parameter, by optimizer group, in the optimizer's order.
        frozen: of each parameter without a gradient.
        buffers: bytes of all buffers, which keep their own precision and are whole on every rank.
    """

    groups: tuple[tuple[int, ...], ...]
    frozen: tuple[int, ...]
    buffers: int

    @classmethod
    def of(cls, model: nn.Module) -> Shapes:
        groups = parameter_groups(model, weight_decay=0.0)
        return cls(
            groups=tuple(tuple(p.numel() for p in group["params"]) for group in groups),
            frozen=tuple(p.numel() for p in model.parameters() if not p.requires_grad),
            buffers=sum(buffer.nbytes for buffer in model.buffers()),
        )

    @property
    def trainable(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def all(self) -> tuple[int, ...]:
        """Of every parameter."""
        return (*(numel for group in self.groups for numel in group), *self.frozen)


@dataclass(frozen=True)
class Strategy:
    """How DeepSpeed 0.19.8 holds and exchanges what is trained; sizes of buckets are in elements.

    Attributes:
        stage: of ZeRO.
        weight: bytes of a weight, and of its gradient as the backward pass computes it.
        accumulate: bytes of an element of the gradients that a stage above 0 accumulates.
        communicate: bytes of an element on the wire when gradients are reduced.
        bf16_optimizer: stage 1 in bf16 with float32 gradients is another class of DeepSpeed, BF16_Optimizer: it keeps
            whole gradients in both precisions and reduces them after the last backward pass.
        all_reduce: stage 2 reduces its buckets by all-reduce, DeepSpeed's default, not by a reduce to each owner.
        contiguous, overlap: gradients are copied into a bucket, into a second one while the first is reduced.
        reduce_bucket, prefetch_bucket: sizes of those buckets, and of what stage 3 gathers ahead.
        persistent: stage 3 keeps parameters of up to this many elements whole on every rank.
        reuse: stage 3 keeps gathered what it needs again within this many elements of parameters.
        offload_optimizer, offload_weights: to host memory, the optimizer state also to a disk.
        swapping: how, if it is on a disk.
    """

    stage: int
    weight: int
    accumulate: int
    communicate: int
    bf16_optimizer: bool
    all_reduce: bool
    contiguous: bool
    overlap: bool
    reduce_bucket: int
    prefetch_bucket: int
    persistent: int
    reuse: int
    offload_optimizer: bool
    offload_weights: bool
    swapping: Swapping | None

    @classmethod
    def of(cls, config: dict[str, Any], precision: str) -> Strategy:
        """Read it from ``deepspeed_config``'s result; what is not set there has DeepSpeed's default."""
        zero = config["zero_optimization"]
        stage, weight = int(zero["stage"]), BYTES[precision]
        accumulate = BYTES[config.get("data_types", {}).get("grad_accum_dtype") or precision]

        def offloaded(section: str) -> bool:
            return (zero.get(section) or {}).get("device", "none") != "none"

        return cls(
            stage=stage,
            weight=weight,
            accumulate=accumulate,
            communicate=BYTES[config.get("communication_data_type") or precision],
            bf16_optimizer=stage == 1
            and precision == "bf16"
            and accumulate == 4
            and not offloaded("offload_optimizer"),
            all_reduce=bool(zero.get("use_multi_rank_bucket_allreduce", True)),
            contiguous=bool(zero.get("contiguous_gradients", True)),
            overlap=bool(zero.get("overlap_comm", stage == 3)),
            reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
            prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            persistent=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
            offload_optimizer=offloaded("offload_optimizer"),
            offload_weights=offloaded("offload_param"),
            swapping=Swapping.of(config),
        )


def strategy_of(recipe: RunConfig, plan: RunPlan, stage: Stage | None = None) -> Strategy:
    """Of a recipe; of another ``stage`` of ZeRO it is that of the packaged configuration.

    Raises RecipeError for a ``ds_config`` that cannot be used.
    """
    if stage is not None and stage != recipe.zero_stage:
        recipe = replace(recipe, zero_stage=stage, ds_config=None)
    return Strategy.of(deepspeed_config(recipe, plan), recipe.precision)
