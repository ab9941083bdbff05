"""PR-MIM's spatial aggregation against a dense grid filled by boolean masks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.nn.aggregation import KeptOnly, PartialConfig, SpatialAggregation, build_aggregation


def plan_of(grid: tuple[int, int], throw_ratio: float) -> MaskPlan:
    sampler = PlanSampler(grid, MaskConfig(), throw_ratio)
    return sampler.stack([sampler(seed) for seed in (1, 2, 3)])


@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("grid", [(6, 6), (4, 8)])
def test_thrown_tokens_are_the_convolution_of_the_others(grid: tuple[int, int], kernel: int) -> None:
    plan = plan_of(grid, 0.4)
    h, w = grid
    aggregation = SpatialAggregation(8, kernel).double()
    visible = torch.randn(*plan.visible.shape, 8, dtype=torch.float64)
    kept = torch.randn(*plan.kept.shape, 8, dtype=torch.float64)
    tokens, ids = aggregation(visible, kept, plan)
    assert ids.equal(plan.masked)
    assert tokens[:, : kept.shape[1]].equal(kept)  # kept tokens pass unchanged
    weight, bias = aggregation.dwconv.weight, aggregation.dwconv.bias
    assert bias is not None
    for b in range(3):
        grid_map = torch.zeros(h * w, 8, dtype=torch.float64)
        grid_map[plan.visible[b]], grid_map[plan.kept[b]] = visible[b], kept[b]
        padded = F.pad(grid_map.view(h, w, 8), (0, 0, *(kernel // 2,) * 4))
        for i, token in enumerate(plan.thrown[b].tolist()):
            row, col = token // w, token % w
            around = padded[row : row + kernel, col : col + kernel]  # (k, k, 8)
            expected = torch.einsum("yxc,cyx->c", around, weight[:, 0]) + bias
            torch.testing.assert_close(tokens[b, kept.shape[1] + i], expected)


def test_without_thrown_tokens_nothing_changes() -> None:
    plan = plan_of((6, 6), 0.0)
    kept = torch.randn(*plan.kept.shape, 8)
    tokens, ids = SpatialAggregation(8, 7)(torch.randn(*plan.visible.shape, 8), kept, plan)
    assert tokens.equal(kept)
    assert ids.equal(plan.kept)


def test_thrown_tokens_reach_kept_and_visible_ones_in_the_backward_pass() -> None:
    plan = plan_of((6, 6), 0.5)
    visible = torch.randn(*plan.visible.shape, 8, requires_grad=True)
    kept = torch.randn(*plan.kept.shape, 8, requires_grad=True)
    tokens, _ = SpatialAggregation(8, 7)(visible, kept, plan)
    tokens[:, kept.shape[1] :].sum().backward()
    for grad in (visible.grad, kept.grad):
        assert grad is not None
        assert grad.abs().amax(2).gt(0).all()  # each has a thrown token within 3


def test_the_baseline_predicts_kept_tokens_only() -> None:
    plan = plan_of((6, 6), 0.5)
    kept = torch.randn(*plan.kept.shape, 8)
    tokens, ids = KeptOnly()(torch.randn(*plan.visible.shape, 8), kept, plan)
    assert tokens is kept
    assert ids is plan.kept


def test_the_recipe_decides_what_stands_between_decoder_and_head() -> None:
    filled = build_aggregation(PartialConfig(kernel_size=5), True, 8)
    assert isinstance(filled, SpatialAggregation)
    assert filled.dwconv.weight.shape == (8, 1, 5, 5)
    assert isinstance(build_aggregation(PartialConfig("none"), True, 8), KeptOnly)
    plain = build_aggregation(PartialConfig(), False, 8)
    assert isinstance(plain, KeptOnly)
    assert not list(nn.Module.parameters(plain))
