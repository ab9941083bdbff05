"""PR-MIM's spatial aggregation against a dense grid filled by boolean masks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.nn.aggregation import KeptOnly, PartialConfig, SpatialAggregation, build_aggregation

DIM = 8
NORM = nn.LayerNorm(DIM, dtype=torch.float64)
OPTIONS = [
    PartialConfig(kernel_size=3),
    PartialConfig(kernel_size=5, bias=False),
    PartialConfig(fill="all"),
    PartialConfig(fill="residual"),
    PartialConfig(after_norm=True),
    PartialConfig("pool", 3, fill="residual"),
    PartialConfig("transformer"),
    PartialConfig("convnext", after_norm=True),
]


def identity(tokens: Tensor) -> Tensor:
    return tokens


def plan_of(grid: tuple[int, int], throw_ratio: float) -> MaskPlan:
    sampler = PlanSampler(grid, MaskConfig(), throw_ratio)
    return sampler.stack([sampler(seed) for seed in (1, 2, 3)])


def decoded(plan: MaskPlan) -> tuple[Tensor, Tensor]:
    """Random visible and kept tokens, float64."""
    torch.manual_seed(0)
    return tuple(
        torch.randn(*ids.shape, DIM, dtype=torch.float64, requires_grad=True) for ids in (plan.visible, plan.kept)
    )  # type: ignore[return-value]


def on_grid(plan: MaskPlan, b: int, visible: Tensor, kept: Tensor) -> Tensor:
    """(h, w, D): a sample's tokens where they belong, zeros at thrown ones."""
    tokens = torch.zeros(plan.grid[0] * plan.grid[1], DIM, dtype=torch.float64)
    tokens[plan.visible[b]], tokens[plan.kept[b]] = visible[b], kept[b]
    return tokens.view(*plan.grid, DIM)


@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("grid", [(6, 6), (4, 8)])
def test_thrown_tokens_are_the_convolution_of_the_others(grid: tuple[int, int], kernel: int) -> None:
    plan = plan_of(grid, 0.4)
    aggregation = SpatialAggregation(PartialConfig(kernel_size=kernel), grid, DIM).double()
    visible, kept = decoded(plan)
    tokens, ids = aggregation(visible, kept, plan, identity)
    assert ids.equal(plan.masked)
    assert tokens[:, : kept.shape[1]].equal(kept)  # kept tokens pass unchanged
    layer: Any = aggregation.layer
    for b in range(3):
        padded = F.pad(on_grid(plan, b, visible, kept), (0, 0, *(kernel // 2,) * 4))
        for i, token in enumerate(plan.thrown[b].tolist()):
            row, col = divmod(token, grid[1])
            around = padded[row : row + kernel, col : col + kernel]  # (k, k, D)
            expected = torch.einsum("yxc,cyx->c", around, layer.weight[:, 0]) + layer.bias
            torch.testing.assert_close(tokens[b, kept.shape[1] + i], expected)


@pytest.mark.parametrize("config", OPTIONS, ids=str)
def test_every_option_is_what_it_says_token_by_token(config: PartialConfig) -> None:
    plan = plan_of((6, 6), 0.5)
    aggregation = SpatialAggregation(config, (6, 6), DIM).double()
    visible, kept = decoded(plan)
    tokens, ids = aggregation(visible, kept, plan, NORM)
    assert ids.equal(plan.masked)
    for b in range(3):
        grid = on_grid(plan, b, visible, kept)
        if config.after_norm:
            grid = on_grid(plan, b, NORM(visible), NORM(kept))  # zeros at thrown ones, not a normed zero
        with torch.no_grad():
            output = aggregation.layer(grid.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
        for i, token in enumerate(ids[b].tolist()):
            at = divmod(token, 6)
            value = output[at]
            if config.fill == "residual":
                value = value + grid[at]
            elif config.fill == "thrown" and i < kept.shape[1]:
                value = grid[at]
            torch.testing.assert_close(tokens[b, i], value if config.after_norm else NORM(value))


def test_pooling_is_the_mean_of_the_square_around_with_zeros_outside() -> None:
    plan = plan_of((6, 6), 0.5)
    visible, kept = decoded(plan)
    aggregation = SpatialAggregation(PartialConfig("pool", 3), (6, 6), DIM)
    assert not list(aggregation.parameters())
    tokens, ids = aggregation(visible, kept, plan, identity)
    padded = F.pad(on_grid(plan, 0, visible, kept), (0, 0, 1, 1, 1, 1))
    for i in range(kept.shape[1], ids.shape[1]):
        row, col = divmod(int(ids[0, i]), 6)
        torch.testing.assert_close(tokens[0, i], padded[row : row + 3, col : col + 3].sum((0, 1)) / 9)


def test_the_transformer_block_tells_thrown_tokens_apart() -> None:
    """All are zeros when they enter: only a position table can."""
    plan = plan_of((6, 6), 0.5)
    visible, kept = decoded(plan)
    tokens, _ = SpatialAggregation(PartialConfig("transformer"), (6, 6), DIM).double()(visible, kept, plan, identity)
    thrown = tokens[0, kept.shape[1] :]
    assert torch.cdist(thrown, thrown).add(torch.eye(len(thrown))).min() > 1e-4


def test_without_thrown_tokens_nothing_changes() -> None:
    plan = plan_of((6, 6), 0.0)
    visible, kept = decoded(plan)
    tokens, ids = SpatialAggregation(PartialConfig(), (6, 6), DIM).double()(visible, kept, plan, NORM)
    assert tokens.equal(NORM(kept))
    assert ids.equal(plan.kept)


@pytest.mark.parametrize("config", OPTIONS, ids=str)
def test_thrown_tokens_reach_kept_and_visible_ones_in_the_backward_pass(config: PartialConfig) -> None:
    plan = plan_of((6, 6), 0.5)
    visible, kept = decoded(plan)
    tokens, _ = SpatialAggregation(config, (6, 6), DIM).double()(visible, kept, plan, identity)
    tokens[:, kept.shape[1] :].sum().backward()
    for grad in (visible.grad, kept.grad):
        assert grad is not None
        reached = grad.abs().amax(2).gt(0).double().mean()
        assert reached == 1 if config.kernel_size == 7 else reached > 0.5  # has a thrown token within 3, or within 1


def test_the_baseline_predicts_kept_tokens_only() -> None:
    plan = plan_of((6, 6), 0.5)
    visible, kept = decoded(plan)
    tokens, ids = KeptOnly()(visible, kept, plan, identity)
    assert tokens is kept
    assert ids is plan.kept


@pytest.mark.parametrize(
    ("config", "throwing", "parameters"),
    [
        (PartialConfig(kernel_size=5), True, DIM * 26),
        (PartialConfig(kernel_size=5, bias=False), True, DIM * 25),
        (PartialConfig("none"), True, 0),
        (PartialConfig("pool"), True, 0),
        (PartialConfig("transformer"), True, 12 * DIM**2 + 13 * DIM),
        (PartialConfig("convnext"), True, 50 * DIM + 8 * DIM**2 + 7 * DIM),
        (PartialConfig(), False, 0),
    ],
)
def test_the_recipe_decides_what_stands_between_decoder_and_head(
    config: PartialConfig, throwing: bool, parameters: int
) -> None:
    module = build_aggregation(config, throwing, (6, 6), DIM)
    assert isinstance(module, SpatialAggregation if throwing and config.aggregation != "none" else KeptOnly)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters


def test_the_convolution_starts_as_pytorch_makes_it() -> None:
    make: Callable[[], Any] = lambda: SpatialAggregation(PartialConfig(), (6, 6), 64).layer.weight  # noqa: E731
    bound = 1 / 7  # U(-1/sqrt(k^2), 1/sqrt(k^2))
    weight = make()
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.95 * bound


@pytest.mark.parametrize(("dim", "heads"), [(512, 16), (256, 8), (96, 3), (8, 1), (40, 1)])
def test_the_transformer_block_is_like_those_of_maes_decoder(dim: int, heads: int) -> None:
    block: Any = SpatialAggregation(PartialConfig("transformer"), (4, 4), dim).layer.block
    assert block.attn.num_heads == heads  # of 32 channels, where those divide the width
    bound = (6 / (dim + 4 * dim)) ** 0.5  # Xavier's, uniform
    assert 0.9 * bound < block.mlp.fc1.weight.abs().max() <= bound
    assert not any(parameter.any() for name, parameter in block.named_parameters() if name.endswith("bias"))
