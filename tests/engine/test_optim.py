"""Parameter groups and the learning rate, against SPEC-style formulas."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.toy import ToyPlan, build_toy
from ummim.engine.optim import OptimConfig, build_optimizer, build_schedule, parameter_groups


def test_only_flat_parameters_and_biases_escape_decay_and_tokens_do_not():
    model = nn.Module()
    model.mask_token = nn.Parameter(torch.zeros(1, 1, 4))
    model.linear = nn.Linear(4, 4)
    model.norm = nn.LayerNorm(4)
    model.table = nn.Module()
    model.table.bias = nn.Parameter(torch.zeros(3, 4))  # two-dimensional, but named .bias
    model.pos_embed = nn.Parameter(torch.zeros(1, 2, 4), requires_grad=False)
    no_decay, decay = parameter_groups(model, 0.05)
    name = {id(p): n for n, p in model.named_parameters()}
    assert [name[id(p)] for p in no_decay["params"]] == ["linear.bias", "norm.weight", "norm.bias", "table.bias"]
    assert [name[id(p)] for p in decay["params"]] == ["mask_token", "linear.weight"]
    assert (no_decay["weight_decay"], decay["weight_decay"]) == (0.0, 0.05)


def test_a_group_without_parameters_is_left_out():
    assert [g["weight_decay"] for g in parameter_groups(nn.Linear(3, 3, bias=False), 0.1)] == [0.1]


def expected(step: int, plan: Any, low: float) -> float:
    if step < plan.warmup_steps:
        return plan.lr * step / plan.warmup_steps
    through = (step - plan.warmup_steps) / (plan.total_steps - plan.warmup_steps)
    return low + (plan.lr - low) * 0.5 * (1 + math.cos(math.pi * through))


@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
@pytest.mark.parametrize("low", [0.0, 1e-5])
def test_the_rate_is_the_papers_formula_at_every_step(warmup, low):
    plan = ToyPlan(warmup_steps=warmup, total_steps=100, lr=1.5e-3)
    config = OptimConfig(min_lr=low)
    optimizer = build_optimizer(build_toy(), config)
    schedule = build_schedule(optimizer, config, plan)
    for step in [*range(100), 50, 3]:  # back again too: a pure function of the step
        schedule.step_update(step)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([expected(step, plan, low)] * 2, rel=1e-12, abs=1e-18)


def test_the_first_step_of_a_warm_up_has_a_rate_of_exactly_zero():
    optimizer = build_optimizer(build_toy(), OptimConfig())
    build_schedule(optimizer, OptimConfig(min_lr=1e-4), ToyPlan()).step_update(0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_a_warm_up_as_long_as_the_run_is_only_a_warm_up():
    plan = ToyPlan(warmup_steps=12, total_steps=12)
    optimizer = build_optimizer(build_toy(), OptimConfig())
    schedule = build_schedule(optimizer, OptimConfig(), plan)
    schedule.step_update(11)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(plan.lr * 11 / 12)


def test_a_groups_scale_multiplies_its_rate_and_its_floor():
    plan, config = ToyPlan(warmup_steps=0), OptimConfig(min_lr=1e-5)
    optimizer = build_optimizer(build_toy(), config)
    optimizer.param_groups[1]["lr_scale"] = 0.5
    schedule = build_schedule(optimizer, config, plan)
    schedule.step_update(plan.total_steps)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-5, 5e-6])
