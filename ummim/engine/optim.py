"""AdamW, its two parameter groups, and the learning rate as a pure function of the optimizer step."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from ummim.run_plan import RunPlan


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule. The defaults are MAE's pre-training (table 8 of the paper).

    Attributes:
        base_lr: learning rate for a batch of ``reference_batch`` images; the run's peak is ``base_lr *
            global_batch / reference_batch`` (the linear scaling rule, Goyal et al. 2017).
        reference_batch: images that ``base_lr`` is quoted for: 256 in the MAE family, 512 in the SimMIM family.
        betas: AdamW's decay rates of the two moments, per optimizer step.
        eps: AdamW's term in the denominator (PyTorch's default; every paper here leaves it).
        weight_decay: decoupled weight decay, multiplied by the learning rate at each step.
        warmup_epochs: epochs of linear warm-up from a learning rate of exactly 0.
        min_lr: what the cosine reaches after the last step; absolute, not scaled with the batch.
        clip_grad: largest global gradient norm; 0 switches clipping off (MAE family: off; SimMIM: 5.0).
    """

    base_lr: float = 1.5e-4
    reference_batch: int = 256
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    warmup_epochs: float = 40.0
    min_lr: float = 0.0
    clip_grad: float = 0.0


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters as the MAE family's pre-training does (timm 0.3.2's helper).

    Not decayed: one-dimensional parameters and names that end in ``.bias``. Everything else is decayed, the
    mask and class tokens too (they have three dimensions). The order, [no decay, decay], is that of the
    official checkpoints' optimizer state. Frozen parameters are in neither group.
    """
    no_decay: list[nn.Parameter] = []
    decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            flat = parameter.ndim == 1 or name.endswith(".bias")
            (no_decay if flat else decay).append(parameter)
    groups = [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """PyTorch's own AdamW, at a learning rate of 0 until the schedule sets one.

    A client optimizer keeps DeepSpeed from compiling its fused one, and the 0 keeps the weights untouched by
    the step that DeepSpeed's 16-bit wrapper takes to allocate its state.
    """
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps)


def build_schedule(optimizer: Any, config: OptimConfig, plan: RunPlan) -> CosineLRScheduler:
    """Linear warm-up from 0, then a cosine to ``min_lr``; ``schedule.step_update(done)`` sets it.

    ``optimizer`` is anything with ``param_groups`` (DeepSpeed's wrappers too) and ``done`` the number of
    optimizer steps already taken: the rate is a pure function of it, so a resumed run needs no state here.
    A group's ``lr_scale`` multiplies its rate, ``min_lr`` included.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = plan.lr
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, plan.total_steps - plan.warmup_steps),
        lr_min=config.min_lr,
        warmup_t=plan.warmup_steps,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )
