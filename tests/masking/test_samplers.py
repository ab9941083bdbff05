"""Mask samplers: what every plan must be, and that chance is fair and repeatable."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ummim.masking import MaskConfig, MaskPlan, PlanSampler, furthest_sample, sample_seed

UNIFORM = MaskConfig("uniform", 0.75, 0.25)
LOWEST = MaskConfig(ties="lowest")

SEED_0_0_A = 8816142829491793548
LOWEST_4X4 = [
    [2, 7, 8, 10],
    [False, False, False, False],
    [0, 1, 3, 4, 5, 6, 12, 15],
    [9, 11, 13, 14],
]  # visible, secondary, kept, thrown
RANDOM_4X4 = [[2, 7, 8, 10], [False, False, False, False], [0, 3, 4, 5, 11, 12, 13, 15], [1, 6, 9, 14]]
UNIFORM_4X4 = [[1, 2, 12, 11], [True, False, False, False], [0, 3, 4, 5, 6, 9, 13, 15], [7, 8, 10, 14]]


def draw_many(sampler: PlanSampler, count: int) -> list[np.ndarray]:
    """The four fields of ``count`` plans, each stacked."""
    plans = [sampler(sample_seed(7, 0, str(i))) for i in range(count)]
    return [np.stack(field) for field in zip(*plans, strict=True)]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 10), st.integers(2, 10), st.sampled_from([0.0, 0.25, 0.5]), st.sampled_from([0.0, 0.3, 0.5]),
    st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_uniform_plans_show_one_token_of_each_block(
    rows: int, cols: int, secondary: float, throw: float, seed: int
) -> None:
    h, w = 2 * rows, 2 * cols
    sampler = PlanSampler((h, w), MaskConfig("uniform", 0.75, secondary), throw)
    plan = sampler(seed)
    blocks = plan.visible // w // 2 * cols + plan.visible % w // 2
    np.testing.assert_array_equal(blocks, np.arange(rows * cols))  # block raster order, each once
    assert plan.secondary.sum() == rows * cols - int(rows * cols * (1 - secondary))
    assert len(plan.thrown) == sampler.thrown_count == int(throw * (h * w))
    assert len(plan.kept) == sampler.kept_count
    everything = np.concatenate([plan.visible, plan.kept, plan.thrown])
    np.testing.assert_array_equal(np.sort(everything), np.arange(h * w))
    stacked = sampler.stack([plan])
    assert stacked.compact
    assert MaskPlan.from_mask(stacked.mask().view(1, h, w)).visible.equal(stacked.visible)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 20), st.integers(2, 20), st.floats(0.3, 0.9), st.sampled_from(["furthest", "random"]),
    st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_random_plans_partition_the_grid(h: int, w: int, ratio: float, throwing: str, seed: int) -> None:
    try:
        sampler = PlanSampler((h, w), MaskConfig("random", ratio, 0.0, throwing), 0.2)  # type: ignore[arg-type]
    except ValueError:
        assert int(h * w * (1 - ratio)) == 0  # nothing visible: a tiny grid
        return
    plan = sampler(seed)
    assert len(plan.visible) == int(h * w * (1 - ratio))
    assert len(plan.thrown) == int(0.2 * (h * w))
    everything = np.concatenate([plan.visible, plan.kept, plan.thrown])
    np.testing.assert_array_equal(np.sort(everything), np.arange(h * w))
    for ids in (plan.visible, plan.kept, plan.thrown):
        assert (np.diff(ids) > 0).all()
    assert not sampler.stack([plan]).compact


def test_each_cell_of_a_block_is_equally_likely() -> None:
    visible = draw_many(PlanSampler((14, 14), UNIFORM), 4000)[0]  # (4000, 49)
    cell = visible // 14 % 2 * 2 + visible % 2
    counts = np.stack([(cell == c).sum(0) for c in range(4)])  # (4, 49)
    chi_square = ((counts - 1000) ** 2 / 1000).sum(0)  # 3 degrees of freedom
    assert chi_square.max() < 25  # exceeded by chance once in 60,000 blocks
    assert 2 < chi_square.mean() < 4  # expected 3


def test_cells_are_balanced_within_a_sample_as_in_the_official_pool() -> None:
    visible = draw_many(PlanSampler((16, 16), UNIFORM), 2000)[0]
    cell = visible // 16 % 2 * 2 + visible % 2
    variance = np.var([(cell == c).sum(1) for c in range(4)], axis=1)
    assert (np.abs(variance - 6) < 1).all()  # independent draws would give 12


def test_every_visible_token_is_equally_likely_secondary() -> None:
    secondary = draw_many(PlanSampler((16, 16), UNIFORM), 4000)[1]
    assert (secondary.sum(1) == 16).all()
    deviation = (secondary.mean(0) - 0.25) / np.sqrt(0.25 * 0.75 / 4000)  # (64,) standard normal
    assert np.abs(deviation).max() < 4.5


def test_every_token_is_equally_likely_visible_under_a_random_mask() -> None:
    visible = draw_many(PlanSampler((14, 14), MaskConfig()), 4000)[0]
    share = np.bincount(visible.ravel(), minlength=196) / 4000
    assert np.abs((share - 0.25) / np.sqrt(0.25 * 0.75 / 4000)).max() < 4.5


def test_random_throwing_is_fair() -> None:
    config = MaskConfig("random", 0.75, 0.0, "random")
    thrown = draw_many(PlanSampler((14, 14), config, 0.5), 4000)[3]
    share = np.bincount(thrown.ravel(), minlength=196) / 4000
    assert np.abs((share - 0.5) / np.sqrt(0.25 / 4000)).max() < 4.5


def test_furthest_throwing_keeps_a_furthest_sample_from_any_start() -> None:
    sampler = PlanSampler((6, 6), LOWEST, 0.5)
    starts = set()
    for seed in range(200):
        plan = sampler(seed)
        masked = np.sort(np.concatenate([plan.kept, plan.thrown]))
        found = [
            first
            for first in plan.kept
            if set(furthest_sample(masked, (6, 6), len(plan.kept), first)) == set(plan.kept)
        ]
        assert found
        starts.add(found[0])
    assert len(starts) > 18  # of 36: the start is drawn, not fixed


def test_furthest_throwing_of_squares_measures_on_their_own_grid() -> None:
    config = MaskConfig(ratio=0.6, unit=2, throw_unit=2, ties="lowest")
    sampler = PlanSampler((14, 14), config, 0.4)
    for seed in range(20):
        plan = sampler(seed)
        corners = [ids[(ids // 14 % 2 == 0) & (ids % 2 == 0)] for ids in (plan.kept, plan.thrown)]
        kept, thrown = (ids // 14 // 2 * 7 + ids % 14 // 2 for ids in corners)
        masked = np.sort(np.concatenate([kept, thrown]))
        assert any(set(furthest_sample(masked, (7, 7), len(kept), first)) == set(kept) for first in kept)


@pytest.mark.parametrize(
    ("side", "config", "throw", "counts"),
    [
        (10, MaskConfig(ratio=0.75), 0.29, (25, 46, 29)),  # 0.29 * 100 is 28.999...
        (20, MaskConfig(ratio=0.75), 0.57, (100, 72, 228)),
        (10, MaskConfig(ratio=0.8, unit=2), 0.0, (20, 80, 0)),  # 20 of 25 units, not 21
        (20, MaskConfig(ratio=0.9, unit=2), 0.0, (40, 360, 0)),
    ],
)
def test_shares_that_binary_numbers_miss_are_counted_right(
    side: int, config: MaskConfig, throw: float, counts: tuple[int, int, int]
) -> None:
    sampler = PlanSampler((side, side), config, throw)
    assert (sampler.visible_count, sampler.kept_count, sampler.thrown_count) == counts


def test_random_ties_are_fair_and_lowest_ids_lean_to_the_top() -> None:
    leaning = {}
    for config in (MaskConfig(), LOWEST):
        kept = draw_many(PlanSampler((14, 14), config, 0.5), 2000)[2]  # (2000, 49)
        leaning[config.ties] = kept.mean() / (195 / 2) - 1  # of the mean id from the grid's middle
    assert abs(leaning["random"]) < 0.003
    assert leaning["lowest"] < -0.01


@pytest.mark.parametrize("throwing", ["furthest", "random"])
def test_thrown_squares_are_whole_and_lie_in_masked_units(throwing: str) -> None:
    config = MaskConfig(ratio=0.6, unit=2, throw_unit=2, throwing=throwing)  # type: ignore[arg-type]
    for seed in range(20):
        plan = PlanSampler((14, 14), config, 0.5)(seed)
        part = np.zeros(196, int)
        part[plan.kept], part[plan.thrown] = 1, 2
        squares = part.reshape(7, 2, 7, 2).transpose(0, 2, 1, 3).reshape(49, 4)
        assert (squares == squares[:, :1]).all()
        assert np.bincount(squares[:, 0]).tolist() == [19, 6, 24]  # 24 = int(0.5 * 49)


@pytest.mark.parametrize(
    ("grid", "config", "throw", "counts"),
    [
        ((14, 14), MaskConfig(), 0.0, (49, 147, 0)),
        ((14, 14), MaskConfig(), 0.25, (49, 98, 49)),
        ((14, 14), MaskConfig(), 0.5, (49, 49, 98)),
        ((14, 14), MaskConfig(), 0.65, (49, 20, 127)),
        ((16, 16), UNIFORM, 0.5, (64, 64, 128)),
        ((7, 7), MaskConfig(), 0.5, (12, 13, 24)),
    ],
)
def test_counts_are_the_papers(
    grid: tuple[int, int], config: MaskConfig, throw: float, counts: tuple[int, int, int]
) -> None:
    sampler = PlanSampler(grid, config, throw)
    plan = sampler(3)
    assert (len(plan.visible), len(plan.kept), len(plan.thrown)) == counts
    assert (sampler.visible_count, sampler.kept_count, sampler.thrown_count) == counts


def test_a_plan_depends_on_its_seed_alone() -> None:
    sampler = PlanSampler((14, 14), UNIFORM, 0.5)
    first = sampler(sample_seed(0, 3, "n01440764/10026"))
    sampler(sample_seed(0, 3, "another"))
    again = PlanSampler((14, 14), UNIFORM, 0.5)(sample_seed(0, 3, "n01440764/10026"))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("config", "throw"),
    [
        (MaskConfig(), 0.0),
        (MaskConfig(), 0.5),
        (UNIFORM, 0.5),
        (MaskConfig(unit=2, throw_unit=2, ratio=0.6), 0.25),
        (MaskConfig(shared_by=4), 0.0),
    ],
)
def test_a_batch_has_the_plans_of_its_samples(config: MaskConfig, throw: float) -> None:
    sampler = PlanSampler((8, 12), config, throw)
    seeds = [0, 2**64 - 1, 5, 5, *(sample_seed(0, 0, str(i)) for i in range(9))]
    found, expected = sampler.batch(seeds), sampler.stack([sampler(seed) for seed in seeds])
    for part in ("visible", "secondary", "kept", "thrown"):
        assert getattr(found, part).dtype == getattr(expected, part).dtype
        assert getattr(found, part).equal(getattr(expected, part))
    assert (found.grid, found.compact, found.shared) == (expected.grid, expected.compact, expected.shared)


def test_seed_epoch_and_key_each_change_the_plan() -> None:
    sampler = PlanSampler((14, 14), MaskConfig())
    seeds = [sample_seed(0, 0, "a"), sample_seed(1, 0, "a"), sample_seed(0, 1, "a"), sample_seed(0, 0, "b")]
    assert len(set(seeds)) == 4
    assert len({sampler(seed).visible.tobytes() for seed in seeds}) == 4


def test_throwing_does_not_change_what_is_visible() -> None:
    for config in (MaskConfig(), UNIFORM):
        plans = [PlanSampler((8, 8), config, throw)(11) for throw in (0.0, 0.5)]
        np.testing.assert_array_equal(plans[0].visible, plans[1].visible)
        np.testing.assert_array_equal(plans[0].secondary, plans[1].secondary)


def test_plans_stay_the_same_from_version_to_version() -> None:
    """Runs are resumed and replayed by seed, so these numbers are for good."""
    assert sample_seed(0, 0, "a") == SEED_0_0_A
    lowest = PlanSampler((4, 4), LOWEST, 0.25)(SEED_0_0_A)
    random = PlanSampler((4, 4), MaskConfig(), 0.25)(SEED_0_0_A)
    uniform = PlanSampler((4, 4), UNIFORM, 0.25)(SEED_0_0_A)
    assert [ids.tolist() for ids in lowest] == LOWEST_4X4
    assert [ids.tolist() for ids in random] == RANDOM_4X4
    assert [ids.tolist() for ids in uniform] == UNIFORM_4X4


@pytest.mark.parametrize(
    ("grid", "config", "throw", "message"),
    [
        ((7, 8), UNIFORM, 0.0, "even grid"),
        ((8, 8), MaskConfig("uniform", 0.6), 0.0, "ratio 0.75"),
        ((14, 14), MaskConfig("random", 0.999), 0.0, "leaves 0 of 196 tokens visible"),
        ((14, 14), MaskConfig("random", 0.0), 0.0, "leaves 196 of 196"),
        ((14, 14), MaskConfig(), 0.75, "throwing ratio 0.75 leaves no kept token"),
        ((14, 14), MaskConfig(unit=2, throw_unit=4), 0.0, "squares of 4 tokens do not divide the mask's units of 2"),
        ((14, 14), MaskConfig(throw_unit=0), 0.0, "squares of 0 tokens"),
        ((14, 14), MaskConfig(), -0.1, "throwing ratio -0.1"),
        ((14, 14), MaskConfig("uniform", 0.75, 1.0), 0.0, "secondary ratio 1.0"),
        ((14, 14), MaskConfig("uniform", 0.75, -0.5), 0.0, "secondary ratio -0.5"),
    ],
)
def test_impossible_masks_are_refused(grid: tuple[int, int], config: MaskConfig, throw: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanSampler(grid, config, throw)


@pytest.mark.parametrize(
    ("grid", "unit", "masked"), [((14, 14), 2, 120), ((6, 6), 1, 22), ((7, 7), 1, 30), ((8, 12), 4, 64)]
)
def test_a_mask_in_units_hides_whole_squares(grid: tuple[int, int], unit: int, masked: int) -> None:
    """SimMIM: ceil(0.6 of the 32-pixel squares), 30 of 49 on ViT-B/16's grid and 22 of 36 at 192 pixels."""
    h, w = grid
    sampler = PlanSampler(grid, MaskConfig("random", 0.6, unit=unit), 0.25)
    plans = [sampler(sample_seed(7, 0, str(i))) for i in range(400)]
    frequency = np.zeros(h * w)
    for plan in plans:
        hidden = np.ones(h * w)
        hidden[plan.visible] = 0
        squares = hidden.reshape(h // unit, unit, w // unit, unit).mean((1, 3))
        assert set(squares.ravel()) <= {0.0, 1.0}
        assert hidden.sum() == masked
        assert sorted([*plan.visible, *plan.kept, *plan.thrown]) == list(range(h * w))
        frequency += hidden
    share = masked / (h * w)
    assert np.abs(frequency / 400 - share).max() < 5 * (share * (1 - share) / 400) ** 0.5


def test_units_that_do_not_tile_the_grid_are_refused() -> None:
    for grid, config in (
        ((7, 7), MaskConfig(unit=2)),
        ((8, 8), MaskConfig("uniform", unit=2)),
        ((8, 8), MaskConfig(unit=0)),
    ):
        with pytest.raises(ValueError, match="do not tile"):
            PlanSampler(grid, config)


def test_neighbours_of_a_group_share_their_mask_and_others_do_not() -> None:
    sampler = PlanSampler((7, 7), MaskConfig(shared_by=4))
    seeds = [sampler.seed(0, 2, f"key {position}", position) for position in range(12)]
    assert [len(set(seeds[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1]
    assert len(set(seeds)) == 3
    assert sampler.seed(0, 3, "key 0", 0) != seeds[0]
    plan = sampler.stack([sampler(seed) for seed in seeds[:4]])
    assert plan.shared == tuple(plan.visible[3].tolist())
    own = PlanSampler((7, 7), MaskConfig())
    assert own.seed(0, 2, "key 0", 5) == sample_seed(0, 2, "key 0")
    assert own.stack([own(1), own(2)]).shared is None
