"""How much memory a run's states take on each rank, by ZeRO stage and precision."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank, without activations, buffers of collectives, and the CUDA context."""

    parameters: float
    gradients: float
    optimizer: float  # AdamW's two moments, and float32 master weights beside 16-bit ones

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer


def zero_state_bytes(parameters: int, stage: int, precision: str, world_size: int) -> StateBytes:
    """State of ``parameters`` trainable weights on one of ``world_size`` ranks.

    Stage 1 shards the optimizer state, stage 2 the gradients too, stage 3 the weights as well. In bf16 the stages
    above 0 accumulate gradients in float32 (our choice of DeepSpeed's ``grad_accum_dtype``); in fp32 stages 1 and 2
    keep a second copy of their share of the weights. Offloading is not counted.
    Source: "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5.
    """
    weight = 4 if precision == "fp32" else 2
    gradient = 4 if precision == "bf16" and stage > 0 else weight
    optimizer = 8 if precision == "fp32" and stage in (0, 3) else 12
    return StateBytes(
        parameters=parameters * weight / (world_size if stage >= 3 else 1),
        gradients=parameters * gradient / (world_size if stage >= 2 else 1),
        optimizer=parameters * optimizer / (world_size if stage >= 1 else 1),
    )
