"""Masks drawn by weight: the distribution of torch.multinomial, the published counts, and a function of the seed."""

import numpy as np
import pytest
import torch

from ummim.masking import AttentionMaskConfig, AttentionSampler, SamplePlan
from ummim.masking.attention import weighted_order

SIMMIM = AttentionMaskConfig(masked=0.44, thrown=0.26, unit=2)


def draw(config: AttentionMaskConfig, seed: int, weights: np.ndarray) -> SamplePlan:
    return AttentionSampler((weights.shape[0], weights.shape[1]), config)(seed, weights)


def uneven(side: int = 14) -> np.ndarray:
    return np.random.default_rng(0).random((side, side)).astype(np.float16)


@pytest.mark.parametrize(
    ("config", "grid", "counts"),
    [
        (AttentionMaskConfig(), (14, 14), (30, 88, 78)),  # AMT on MAE ViT-B/16
        (AttentionMaskConfig(), (16, 16), (39, 115, 102)),
        (SIMMIM, (14, 14), (56, 88, 52)),  # on SimMIM: 14, 22 and 13 units
        (AttentionMaskConfig(masked=0.75, thrown=0.0), (14, 14), (49, 147, 0)),  # masking without throwing
    ],
)
def test_counts_are_the_published_ones(
    config: AttentionMaskConfig, grid: tuple[int, int], counts: tuple[int, int, int]
) -> None:
    sampler = AttentionSampler(grid, config)
    assert (sampler.visible_count, sampler.kept_count, sampler.thrown_count) == counts
    plan = sampler(3, np.ones(grid))
    assert tuple(len(ids) for ids in (plan.visible, plan.kept, plan.thrown)) == counts


@pytest.mark.parametrize("config", [AttentionMaskConfig(), SIMMIM])
def test_every_token_has_one_part_and_ids_ascend(config: AttentionMaskConfig) -> None:
    for seed in range(50):
        plan = draw(config, seed, uneven())
        for ids in (plan.visible, plan.kept, plan.thrown):
            assert ids.dtype == np.int64
            assert (np.diff(ids) > 0).all()
        assert sorted(np.concatenate([plan.visible, plan.kept, plan.thrown])) == list(range(196))
        assert not plan.secondary.any()
        assert plan.secondary.shape == plan.visible.shape


def test_units_are_whole_squares() -> None:
    plan = draw(SIMMIM, 7, uneven())
    for ids in (plan.visible, plan.kept, plan.thrown):
        part = np.zeros(196, bool)
        part[ids] = True
        squares = part.reshape(7, 2, 7, 2).sum((1, 3))
        assert set(squares.ravel()) <= {0, 4}


def test_a_units_weight_is_the_sum_of_its_tokens() -> None:
    """One token of unit (2, 3) is all there is: that unit comes first in every draw."""
    weights = np.zeros((14, 14))
    weights[5, 6] = 1e-3
    for seed in range(20):
        kept = draw(SIMMIM, seed, weights).kept
        assert {4 * 14 + 6, 4 * 14 + 7, 5 * 14 + 6, 5 * 14 + 7} <= set(kept)


def test_a_plan_is_a_function_of_seed_and_weights() -> None:
    weights = uneven()
    first, again, other = (draw(AttentionMaskConfig(), seed, weights) for seed in (2**64 - 1, 2**64 - 1, 5))
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(first.kept, other.kept)
    assert not np.array_equal(first.kept, draw(AttentionMaskConfig(), 2**64 - 1, weights[::-1]).kept)
    scaled = draw(AttentionMaskConfig(), 5, weights.astype(np.float64) * 1024)
    assert np.array_equal(other.kept, scaled.kept)  # only ratios count


def test_first_and_second_draw_have_the_chances_of_sampling_without_replacement() -> None:
    weights = np.array([5.0, 3.0, 1.0, 1.0])
    orders = np.array([weighted_order(np.uint64(seed), weights) for seed in range(40_000)])
    share = weights / weights.sum()
    found = np.bincount(orders[:, 0], minlength=4) / len(orders)
    assert found == pytest.approx(share, abs=0.01)
    second = np.zeros(4)
    for i in range(4):
        for j in range(4):
            if i != j:
                second[j] += share[i] * share[j] / (1 - share[i])
    assert np.bincount(orders[:, 1], minlength=4) / len(orders) == pytest.approx(second, abs=0.01)


def test_inclusion_is_distributed_like_torch_multinomial() -> None:
    """How often each token is masked, thrown and visible, against the call of the official code."""
    weights = uneven(6).astype(np.float64) ** 2
    sampler = AttentionSampler((6, 6), AttentionMaskConfig())  # 16 masked, 14 thrown, 6 visible
    ours, theirs, draws = np.zeros((3, 36)), np.zeros((3, 36)), 20_000
    for seed in range(draws):
        plan = sampler(seed, weights)
        for part, ids in enumerate((plan.kept, plan.thrown, plan.visible)):
            ours[part, ids] += 1
    torch.manual_seed(0)
    order = torch.multinomial(torch.tensor(weights).flatten().expand(draws, -1), 36).numpy()
    for part, ids in enumerate((order[:, :16], order[:, 16:30], order[:, 30:])):
        theirs[part] = np.bincount(ids.ravel(), minlength=36)
    assert ours / draws == pytest.approx(theirs / draws, abs=0.02)  # standard error of a difference: 0.005
    assert np.ptp(ours[0]) / draws > 0.5  # and the weights matter


def test_tokens_without_weight_come_last() -> None:
    weights = np.zeros((4, 4))
    weights[0, :] = 1e-30
    for seed in range(100):
        assert set(weighted_order(np.uint64(seed), weights.ravel())[:4]) == {0, 1, 2, 3}


def test_a_map_without_any_weight_masks_uniformly() -> None:
    counts = np.zeros(36)
    for seed in range(4000):
        counts[draw(AttentionMaskConfig(), seed, np.zeros((6, 6))).kept] += 1
    assert counts / 4000 == pytest.approx(16 / 36, abs=0.04)


def test_a_batch_is_stacked_like_any_other() -> None:
    sampler = AttentionSampler((14, 14), AttentionMaskConfig())
    plan = sampler.stack([sampler(seed, uneven()) for seed in range(3)])
    assert [tuple(ids.shape) for ids in (plan.visible, plan.kept, plan.thrown)] == [(3, 30), (3, 88), (3, 78)]
    assert plan.grid == (14, 14)
    assert not plan.compact
    assert plan.shared is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AttentionMaskConfig(unit=3), "do not tile"),
        (AttentionMaskConfig(unit=0), "do not tile"),
        (AttentionMaskConfig(masked=0.6, thrown=0.4), "0 visible"),
        (AttentionMaskConfig(masked=0.0), "0 masked"),
        (AttentionMaskConfig(masked=0.001), "0 masked"),
        (AttentionMaskConfig(masked=0.9, thrown=-0.2), "-0.2 thrown"),
        (AttentionMaskConfig(masked=0.9, thrown=0.5), "visible"),
    ],
)
def test_impossible_shares_are_refused(config: AttentionMaskConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionSampler((14, 14), config)
