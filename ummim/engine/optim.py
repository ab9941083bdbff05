"""AdamW or LARS, the parameter groups, and the learning rate as a pure function of the optimizer step."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.optim.lars import Lars
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ummim.run_plan import RunPlan


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule. The defaults are MAE's pre-training (table 8 of the paper).

    Attributes:
        optimizer: ``adamw``, or timm's ``lars`` (MAE's linear probe; layers must be whole: zero_stage 0).
        base_lr: learning rate for a batch of ``reference_batch`` images; the run's peak is ``base_lr *
            global_batch / reference_batch`` (the linear scaling rule, Goyal et al. 2017).
        reference_batch: images that ``base_lr`` is quoted for: 256 in the MAE family, 512 in the SimMIM family.
        betas: AdamW's decay rates of the two moments, per optimizer step.
        eps: AdamW's term in the denominator (PyTorch's default; every paper here leaves it).
        momentum: of LARS.
        weight_decay: decoupled weight decay, multiplied by the learning rate at each step.
        schedule: after the warm-up, ``cosine`` falls to ``min_lr`` over the rest of the run, ``step`` stays at the
            peak and is multiplied by ``decay_rate`` at each of ``decay_epochs`` (SimMIM's 800 epochs).
        warmup_epochs: epochs of linear warm-up from ``warmup_lr`` to the peak.
        warmup_lr: where the warm-up starts; quoted and scaled like ``base_lr`` (MAE family: exactly 0).
        cosine_over_warmup: the cosine counts the warm-up's steps as gone, as in SimMIM's official code, so that the
            rate drops a little where the warm-up ends; without it, it begins there, at the peak (MAE family).
        min_lr: what the cosine reaches after the last step; absolute, not scaled with the batch.
        decay_epochs: epochs, ascending, after which ``step`` lowers the rate; those beyond the run never come.
        decay_rate: what ``step`` multiplies the rate by.
        clip_grad: largest global gradient norm; 0 switches clipping off (MAE family: off; SimMIM: 5.0).
    """

    optimizer: Literal["adamw", "lars"] = "adamw"
    base_lr: float = 1.5e-4
    reference_batch: int = 256
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.05
    schedule: Literal["cosine", "step"] = "cosine"
    warmup_epochs: float = 40.0
    warmup_lr: float = 0.0
    cosine_over_warmup: bool = False
    min_lr: float = 0.0
    decay_epochs: tuple[float, ...] = ()
    decay_rate: float = 0.1
    clip_grad: float = 0.0


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters as the MAE family's pre-training does (timm 0.3.2's helper).

    Not decayed: one-dimensional parameters and names that end in ``.bias``. Everything else is decayed, the
    mask and class tokens too (they have three dimensions), and tables of relative positions (as in SimMIM's
    official pre-training, if against its intent; see ``ummim.methods.simmim.Config``). The order, [no decay,
    decay], is that of the official checkpoints' optimizer state. Frozen parameters are in neither group.
    """
    no_decay: list[nn.Parameter] = []
    decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            flat = parameter.ndim == 1 or name.endswith(".bias")
            (no_decay if flat else decay).append(parameter)
    groups = [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]
    return [group for group in groups if group["params"]]


def layer_decay_groups(
    model: nn.Module, layer_ids: Mapping[str, int], decay: float, weight_decay: float, exempt: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Split the trainable parameters by layer: a layer's ``lr_scale`` is ``decay ** (top - id)`` (BEiT, MAE, SimMIM).

    The groups ascend, so that the last one has the full rate. Not decayed, as weights, are one-dimensional parameters
    and those that ``exempt`` names.

    Args:
        model: the model.
        layer_ids: each trainable parameter's layer, by name; the highest is the head's.
        decay: a layer's rate as a multiple of the next one's.
        weight_decay: of the others.
        exempt: names of parameters that are not decayed whatever their shape.
    """
    top = max(layer_ids.values())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, flat = layer_ids[name], parameter.ndim == 1 or name in exempt
            new = {"params": [], "weight_decay": 0.0 if flat else weight_decay, "lr_scale": decay ** (top - layer)}
            groups.setdefault((layer, not flat), new)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """PyTorch's own AdamW, or timm's LARS, at a learning rate of 0 until the schedule sets one.

    A client optimizer keeps DeepSpeed from compiling its fused one, and the 0 keeps the weights untouched by
    the step that DeepSpeed's 16-bit wrapper takes to allocate its state. A model with rates of its own has
    ``parameter_groups(weight_decay)``; for others see the function of that name.
    """
    own = getattr(model, "parameter_groups", None)
    groups = own(config.weight_decay) if own else parameter_groups(model, config.weight_decay)
    if config.optimizer == "lars":
        for group in groups:  # MAE: neither decay nor trust ratio for biases and norms
            group["always_adapt"] = any(parameter.ndim > 1 for parameter in group["params"])
        return Lars(groups, lr=0.0, momentum=config.momentum, trust_coeff=0.001)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps)


def build_schedule(optimizer: Any, config: OptimConfig, plan: RunPlan) -> Scheduler:
    """Linear warm-up, then a cosine or steps down; ``schedule.step_update(done)`` sets the rate.

    ``optimizer`` is anything with ``param_groups`` (DeepSpeed's wrappers too) and ``done`` the number of
    optimizer steps already taken: the rate is a pure function of it, so a resumed run needs no state here.
    A group's ``lr_scale`` multiplies its rate, ``min_lr`` included. (SimMIM's official counter lags by one step.)
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = plan.lr
    warmup: dict[str, Any] = {
        "warmup_t": plan.warmup_steps,
        "warmup_lr_init": config.warmup_lr * plan.global_batch / config.reference_batch,
        "t_in_epochs": False,
    }
    if config.schedule == "step":
        # timm applies the milestone m at m - 1; counted from the run's first step, as in SimMIM's official code.
        milestones = [round(epoch * plan.steps_per_epoch) + 1 for epoch in config.decay_epochs]
        return MultiStepLRScheduler(
            optimizer, decay_t=milestones, decay_rate=config.decay_rate, warmup_prefix=False, **warmup
        )
    gone = 0 if config.cosine_over_warmup else plan.warmup_steps
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, plan.total_steps - gone),
        lr_min=config.min_lr,
        warmup_prefix=not config.cosine_over_warmup,
        **warmup,
    )
