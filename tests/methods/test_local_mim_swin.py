"""LocalMIM on a Swin: its fast path against LocalMIM written plainly, and whose tokens are whose."""

from dataclasses import replace

import pytest
import torch

from tests.methods.plain_local_mim import check_against_the_plain_one, every_scale, job
from ummim.backbones.table_swin import TableSwinConfig
from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.methods.local_mim import Config, LocalDecoderConfig, LocalMIM
from ummim.nn.aggregation import PartialConfig

SWIN = TableSwinConfig(embed_dim=8, depths=(2, 2, 3, 1), num_heads=(1, 2, 2, 4), window_size=4)
SMALL = Config(
    encoder=SWIN,
    decoder=LocalDecoderConfig(embed_dims=(8, 16, 12, 24), num_heads=2),
    target="pixel",
)
SHARED = MaskConfig(shared_by=2)


@pytest.mark.parametrize(
    ("image_size", "window", "ratio", "throw", "aggregation"),
    [
        (128, 4, 0.75, 0.0, "conv"),
        (128, 4, 0.75, 0.5, "conv"),
        (128, 8, 0.5, 0.25, "none"),
        (96, 6, 0.6, 0.0, "conv"),  # windows cut through units
    ],
)
def test_equals_the_plain_implementation(
    image_size: int, window: int, ratio: float, throw: float, aggregation: str
) -> None:
    config = replace(SMALL, encoder=replace(SWIN, window_size=window))
    check_against_the_plain_one(*job(config, image_size, replace(SHARED, ratio=ratio), throw, aggregation))


@pytest.mark.parametrize("biased", [False, True])
def test_with_gradients_as_target_equals_the_plain_implementation(biased: bool) -> None:
    config = replace(SMALL, target="hog", hog_bins=18 if biased else 9, hog_bias=biased)
    model, images, plan = job(config, 64, replace(SHARED, ratio=0.5), 0.25)
    assert not model.predicts_pixels
    check_against_the_plain_one(model, images, plan)


@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_official_quirks_equal_the_plain_implementation_and_change_the_loss(row_major: bool, legacy: bool) -> None:
    config = replace(SMALL, row_major_merge=row_major, legacy_coordinates=legacy)
    model, images, plan = job(config, 128, SHARED, 0.0)
    check_against_the_plain_one(model, images, plan)
    mended, _, _ = job(SMALL, 128, SHARED, 0.0)
    assert (model(images, plan).loss == mended(images, plan).loss) == (not row_major and not legacy)


def test_a_masked_unit_is_masked_at_every_scale() -> None:
    model, images, plan = job(SMALL, 128, SHARED, 0.25)
    units = plan.masked.sort(1).values
    for (_, fine), side in zip(model.encode(images, plan), (4, 2, 1, 1), strict=True):
        assert fine.grid == (4 * side, 4 * side)
        for name in ("visible", "kept", "thrown"):
            cells, of = getattr(fine, name), getattr(plan, name)
            row, col = cells // fine.grid[1] // side, cells % fine.grid[1] // side
            assert (row * 4 + col).equal(of.repeat_interleave(side**2, 1))
        assert torch.cat([fine.visible, fine.kept, fine.thrown], 1).sort(1).values[0].equal(torch.arange(16 * side**2))
    predictions = every_scale(model, images, plan)
    assert [p.values.shape[1] // units.shape[1] for p in predictions] == [16, 4, 1, 1]
    assert [p.values.shape[2] for p in predictions] == [192, 768, 3072, 3072]


def test_masked_pixels_never_reach_the_encoder() -> None:
    model, images, plan = job(SMALL, 128, SHARED, 0.0)
    hidden = plan.mask().view(2, 1, 4, 4).repeat_interleave(32, 2).repeat_interleave(32, 3)
    torn = images.masked_fill(hidden, float("nan"))
    for ours, whole in zip(every_scale(model, torn, plan), every_scale(model, images, plan), strict=True):
        assert ours.values.equal(whole.values)


def test_samples_with_masks_of_their_own_are_refused() -> None:
    model, images, _ = job(SMALL, 128, SHARED, 0.0)
    sampler = PlanSampler((4, 4), MaskConfig())
    with pytest.raises(ValueError, match="share one mask"):
        model(images, sampler.stack([sampler(seed) for seed in (0, 1)]))


def test_the_order_of_the_visible_units_does_not_matter() -> None:
    model, images, plan = job(SMALL, 128, SHARED, 0.0)
    assert plan.shared is not None
    turned = MaskPlan(plan.grid, plan.visible.flip(1), plan.secondary, plan.kept, plan.thrown, shared=plan.shared[::-1])
    torch.testing.assert_close(model(images, turned).loss, model(images, plan).loss, rtol=1e-12, atol=0)


def test_the_blocks_are_all_transformer_blocks() -> None:
    model = SMALL.build(64, PartialConfig(), True)
    assert isinstance(model, LocalMIM)
    assert len(model.blocks()) == 8 + 4
