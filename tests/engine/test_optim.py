"""Parameter groups and the learning rate, against the papers' formulas."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.toy import ToyPlan, build_toy
from ummim.backbones.relative_vit import RelativeViT, RelativeViTConfig
from ummim.engine.optim import OptimConfig, build_optimizer, build_schedule, parameter_groups
from ummim.errors import RecipeError
from ummim.recipe_file import load_recipe


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


def rates(config: OptimConfig, plan: Any) -> list[float]:
    optimizer = build_optimizer(build_toy(), config)
    schedule = build_schedule(optimizer, config, plan)
    found = []
    for step in range(plan.total_steps):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    for step in (plan.total_steps - 1, 0, 1):  # back again too: a pure function of the step
        schedule.step_update(step)
        assert optimizer.param_groups[0]["lr"] == found[step]
    return found


def test_steps_down_happen_at_the_first_step_of_their_epoch():
    plan = ToyPlan(warmup_steps=6, total_steps=40, steps_per_epoch=4, lr=1e-3)
    config = OptimConfig(schedule="step", decay_epochs=(5, 8.5), decay_rate=0.1)
    expected = [1e-3 * step / 6 for step in range(6)] + [1e-3] * 14 + [1e-4] * 14 + [1e-5] * 6
    assert rates(config, plan) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_the_warm_up_starts_from_a_rate_that_scales_with_the_batch(schedule):
    """SimMIM's 800 epochs: from 5e-7 to 1e-4 for 512 images, so from 2e-6 to 4e-4 for 2048."""
    plan = ToyPlan(micro_batch=512, warmup_steps=10, total_steps=100, lr=4e-4)
    assert plan.global_batch == 2048
    config = OptimConfig(schedule=schedule, base_lr=1e-4, reference_batch=512, warmup_lr=5e-7, decay_epochs=(20,))
    expected = [2e-6 + (4e-4 - 2e-6) * step / 10 for step in range(11)]
    assert rates(config, plan)[:11] == pytest.approx(expected, rel=1e-12)


def test_simmims_cosine_counts_the_warm_up_as_gone():
    plan = ToyPlan(warmup_steps=10, total_steps=100, lr=8e-4)
    found = rates(OptimConfig(min_lr=4e-5, cosine_over_warmup=True), plan)
    assert found[:10] == pytest.approx([8e-4 * step / 10 for step in range(10)], abs=1e-18)
    cosine = [4e-5 + (8e-4 - 4e-5) * 0.5 * (1 + math.cos(math.pi * step / 100)) for step in range(10, 100)]
    assert found[10:] == pytest.approx(cosine, rel=1e-12)
    assert found[10] < 8e-4


def test_relative_position_tables_are_decayed_as_officially():
    model = RelativeViT(16, RelativeViTConfig(8, 8, 1, 1))
    no_decay, decay = parameter_groups(model, 0.05)
    name = {id(p): n for n, p in model.named_parameters()}
    decayed = {name[id(p)] for p in decay["params"]}
    assert {"rel_pos_bias.relative_position_bias_table", "mask_token", "cls_token"} < decayed
    spared = {name[id(p)] for p in no_decay["params"]}
    assert {"blocks.0.gamma_1", "blocks.0.attn.q_bias", "blocks.0.attn.v_bias"} < spared


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optim.warmup_lr=-1e-6", "between 0 and base_lr"),
        ("optim.warmup_lr=2e-4", "between 0 and base_lr"),
        ("optim.decay_epochs=[]", "goes with schedule: step"),
        ("optim.schedule=cosine", "goes with schedule: step"),
        ("optim.decay_epochs=[700,600]", "ascend"),
        ("optim.decay_epochs=[0]", "ascend"),
        ("optim.decay_rate=0", "above 0"),
        ("optim.schedule=stairs", "expected one of"),
    ],
)
def test_schedule_keys_that_do_not_fit_are_named(override, problem):
    with pytest.raises(RecipeError, match=problem):
        load_recipe("simmim_vit_base_800e", [override])


def test_steps_down_beyond_a_shortened_run_do_no_harm():
    optim = load_recipe("simmim_vit_base_800e", ["epochs=20"]).optim
    plan = ToyPlan(warmup_steps=2, total_steps=20, steps_per_epoch=1, lr=1e-3)
    assert rates(optim, plan)[2:] == pytest.approx([1e-3] * 18)
