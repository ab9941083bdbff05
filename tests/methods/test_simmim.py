"""SimMIM's fast path against SimMIM written plainly, on each of its four encoders."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.plain_simmim import plain_simmim, plain_um_simmim
from ummim.backbones.pvt import PVTConfig
from ummim.backbones.relative_vit import RelativeViTConfig
from ummim.backbones.swin import SwinConfig
from ummim.backbones.table_swin import TableSwinConfig
from ummim.errors import RecipeError
from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.methods.simmim import Config, SimMIM, absolute_error
from ummim.nn.aggregation import PartialConfig, SpatialAggregation

RELATIVE_VIT = RelativeViTConfig(patch_size=4, embed_dim=24, depth=3, num_heads=3, drop_path=0.0)
TABLE_SWIN = TableSwinConfig(8, (2, 2, 3, 2), (1, 2, 2, 4), window_size=4)
VIT, SWIN = Config(RELATIVE_VIT), Config(TABLE_SWIN)
UM_SWIN = Config(SwinConfig(8, (2, 2, 3, 2), (1, 2, 2, 4), window_size=4, pos_mlp_dim=6))
PVT = Config(PVTConfig((8, 12, 16, 24), (2, 1, 2, 1), (1, 2, 4, 3), (3.0, 2.0, 2.0, 2.0), (4, 2, 2, 1)))


def job(config: Config, image_size: int, mask: MaskConfig, throw: float = 0.0) -> tuple[SimMIM, Tensor, MaskPlan]:
    torch.manual_seed(0)
    model = SimMIM(image_size, config, throwing=throw > 0).double()
    for parameter in model.parameters():  # no zero tables and biases: they would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    sampler = PlanSampler(model.grid, mask, throw)
    plan = sampler.stack([sampler(seed) for seed in range(3)])
    return model, torch.randn(3, 3, image_size, image_size, dtype=torch.float64), plan


def plain(model: SimMIM, images: Tensor, plan: MaskPlan) -> tuple[Tensor, Tensor]:
    if isinstance(model.encoder.config, (SwinConfig, PVTConfig)):
        return plain_um_simmim(model, images, plan.mask())
    return plain_simmim(model, images, plan.mask(), torch.zeros_like(plan.mask()).scatter(1, plan.thrown, True))


CASES: dict[str, tuple[Config, int, MaskConfig, float]] = {
    "vit": (VIT, 24, MaskConfig(ratio=0.6), 0.0),
    "vit, norm-pix": (replace(VIT, norm_pix_loss=True), 24, MaskConfig(ratio=0.6), 0.0),
    "vit, units of 2x2 tokens": (VIT, 24, MaskConfig(ratio=0.6, unit=2), 0.0),
    "vit, thrown": (VIT, 24, MaskConfig(ratio=0.6), 0.5),
    "vit, all masked tokens but one thrown": (VIT, 20, MaskConfig(ratio=0.6), 0.58),
    "vit, units, a few thrown": (VIT, 24, MaskConfig(ratio=0.6, unit=2), 0.1),
    "swin": (SWIN, 128, MaskConfig(ratio=0.6), 0.0),
    "swin, norm-pix": (replace(SWIN, norm_pix_loss=True), 64, MaskConfig(ratio=0.6), 0.0),
    "swin, odd window": (Config(replace(TABLE_SWIN, window_size=3)), 96, MaskConfig(ratio=0.6), 0.0),
    "swin, one window from the third stage": (Config(replace(TABLE_SWIN, window_size=6)), 96, MaskConfig(), 0.0),
    "um swin": (UM_SWIN, 64, MaskConfig(), 0.0),
    "um swin, norm-pix": (replace(UM_SWIN, norm_pix_loss=True), 64, MaskConfig(), 0.0),
    "pvt": (PVT, 64, MaskConfig(), 0.0),
    "pvt, uniform mask": (PVT, 64, MaskConfig("uniform"), 0.0),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_implementation(case: str) -> None:
    model, images, plan = job(*CASES[case])
    loss, prediction = plain(model, images, plan)
    output = model(images, plan)
    torch.testing.assert_close(output.loss, loss, rtol=1e-10, atol=0)
    masked = plan.mask()
    torch.testing.assert_close(output.prediction[masked], prediction[masked], rtol=1e-8, atol=1e-8)
    assert output.prediction[~masked].eq(0).all()
    parameters = list(model.parameters())
    fast, slow = (torch.autograd.grad(each, parameters) for each in (output.loss, loss))
    torch.testing.assert_close(fast, slow, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_masked_pixels_never_reach_the_encoder(case: str) -> None:
    model, images, plan = job(*CASES[case])
    (h, w), p = model.grid, model.patch_size
    hidden = plan.mask().view(3, 1, h, w).repeat_interleave(p, 2).repeat_interleave(p, 3)
    torn = images.masked_fill(hidden, float("nan"))
    assert model(torn, plan).predicted.equal(model(images, plan).predicted)


@pytest.mark.parametrize("config", [VIT, SWIN, UM_SWIN, PVT])
def test_only_visible_patches_are_embedded_and_only_masked_ones_predicted(config: Config) -> None:
    model, images, plan = job(config, 64, MaskConfig(ratio=0.5))
    embedded: list[int] = []
    model.encoder.patch_embed.proj.register_forward_hook(lambda _m, _i, out: embedded.append(out[..., 0].numel()))
    output = model(images, plan)
    tokens = (64 // 4) ** 2  # all four have tokens of 4 pixels
    assert embedded == [3 * tokens * plan.visible.shape[1] // (plan.grid[0] * plan.grid[1])]
    assert output.predicted.shape == (3, plan.kept.shape[1], model.patch_size**2 * 3)
    assert output.ids.equal(plan.kept)


def test_thrown_tokens_leave_the_encoders_sequence() -> None:
    model, images, plan = job(VIT, 24, MaskConfig(ratio=0.6), 0.5)
    lengths: list[tuple[int, ...]] = []
    model.blocks()[0].register_forward_hook(lambda _m, inputs, _o: lengths.append(inputs[0].shape))
    output = model(images, plan)
    assert lengths == [(3, 1 + 36 - 18, 24)]
    assert output.ids.equal(plan.masked)  # and yet every masked token is predicted
    assert isinstance(model.aggregation, SpatialAggregation)


def test_without_thrown_tokens_the_aggregation_changes_nothing() -> None:
    model, images, plan = job(VIT, 24, MaskConfig(ratio=0.6))
    filled = SimMIM(24, VIT, throwing=True).double()
    filled.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(filled(images, plan).loss, model(images, plan).loss)


def test_the_baseline_without_aggregation_predicts_kept_tokens_only() -> None:
    torch.manual_seed(0)
    model = SimMIM(24, VIT, PartialConfig(aggregation="none"), throwing=True)
    sampler = PlanSampler(model.grid, MaskConfig(ratio=0.6), 0.5)
    plan = sampler.stack([sampler(seed) for seed in range(2)])
    assert model(torch.randn(2, 3, 24, 24), plan).ids.equal(plan.kept)


@pytest.mark.parametrize("config", [VIT, SWIN])
def test_the_loss_is_pixels_absolute_error_by_pixels_plus_epsilon_by_channels(config: Config) -> None:
    model, images, plan = job(config, 64, MaskConfig(ratio=0.6))
    output, p = model(images, plan), model.patch_size
    cells = images.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    total = (output.prediction - cells)[plan.mask()].abs().sum()
    pixels = torch.tensor(3 * plan.kept.shape[1] * p**2, dtype=torch.float32)
    torch.testing.assert_close(output.loss, total / (pixels + 1e-5) / 3, rtol=1e-12, atol=0)


def test_epsilon_counts_where_single_precision_can_hold_it() -> None:
    prediction, target = torch.ones(1, 1, 3, dtype=torch.float64), torch.zeros(1, 1, 3, dtype=torch.float64)
    expected = (torch.ones((), dtype=torch.float32) + 1e-5).item()  # one pixel
    assert absolute_error(prediction, target, 1e-5).item() == pytest.approx(1 / expected, rel=1e-12)
    assert absolute_error(prediction[:, :0], target[:, :0], 1e-5) == 0
    half = absolute_error(prediction.bfloat16(), target.float(), 0.0)
    assert (half.dtype, half.item()) == (torch.float32, 1.0)


def test_masked_units_are_counted_upwards() -> None:
    """Ceil of 60%: 30 of 49 units of 2x2 tokens at 224 pixels, 22 of 36 at 192 (SimMIM, section 4.1)."""
    for grid, mask, masked in (((14, 14), MaskConfig(ratio=0.6, unit=2), 120), ((6, 6), MaskConfig(ratio=0.6), 22)):
        sample = PlanSampler(grid, mask)(0)
        assert len(sample.kept) == masked


def test_a_width_without_a_position_table_is_refused_where_the_aggregation_needs_one() -> None:
    config, transformer = Config(RelativeViTConfig(embed_dim=90, depth=1, num_heads=3)), PartialConfig("transformer")
    with torch.device("meta"):
        config.build(224, PartialConfig(), throwing=True)
        config.build(224, transformer, throwing=False)
        with pytest.raises(RecipeError, match="partial.aggregation = 'transformer': .* multiple of 4 channels, not 90"):
            config.build(224, transformer, throwing=True)


@pytest.mark.parametrize("config", [SWIN, UM_SWIN, PVT])
def test_only_the_vit_can_throw_tokens(config: Config) -> None:
    with pytest.raises(RecipeError, match="no partial reconstruction"):
        config.check(64, MaskConfig(), 0.5)
    model, images, _ = job(config, 64, MaskConfig())
    mask = torch.ones(3, *model.grid, dtype=torch.bool)
    mask[:, 0] = False
    thrown = mask.clone()
    thrown[:, -1] = False
    thrown[:, 0] = False
    if model.grid[0] < 3:
        thrown[:, -1, 0] = True
    with pytest.raises(ValueError, match="no plan with thrown tokens"):
        model(images, MaskPlan.from_mask(mask, thrown=thrown))
    VIT.check(24, MaskConfig(ratio=0.6), 0.5)


@pytest.mark.parametrize(
    ("config", "image_size", "key", "problem"),
    [
        (VIT, 30, "data.image_size", "no multiple of the patch size 4"),
        (Config(replace(RELATIVE_VIT, num_heads=5)), 24, "method.encoder.num_heads", "5 heads"),
        (Config(replace(RELATIVE_VIT, drop_path=1.0)), 24, "method.encoder.drop_path", "a chance"),
        (SWIN, 100, "data.image_size", "a multiple of 32, such as 96"),
        (SWIN, 96, "method.encoder.window_size", "does not divide the 6x6 tokens of stage 3"),
        (Config(replace(TABLE_SWIN, num_heads=(1, 2, 3, 4))), 128, "method.encoder.num_heads", "3 heads"),
        (UM_SWIN, 96, "method.encoder.window_size", "stage 3"),
        (UM_SWIN, 100, "data.image_size", "multiple of 32"),
    ],
)
def test_sizes_that_do_not_fit_are_named(config: Config, image_size: int, key: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem) as error:
        config.check(image_size, MaskConfig(), 0.0)
    assert error.value.key == key


def test_the_mask_grid_is_the_encoders() -> None:
    sides = [config.mask_grid(192)[0] for config in (Config(), SWIN, UM_SWIN, PVT)]
    assert sides == [12, 6, 12, 12]
    assert all(SimMIM(64, config).grid == config.mask_grid(64) for config in (VIT, SWIN, UM_SWIN, PVT))


def test_heads_are_initialised_as_officially() -> None:
    torch.manual_seed(0)
    simmim: Any = SimMIM(64, SWIN).head
    assert simmim.weight.abs().max() <= 64**-0.5 < simmim.weight.abs().max() * 1.01
    assert simmim.bias.std() > 0
    um: Any = SimMIM(64, UM_SWIN).head
    assert um.bias.eq(0).all()


@pytest.mark.parametrize("config", [VIT, SWIN, UM_SWIN, PVT])
def test_blocks_are_all_blocks(config: Config) -> None:
    depth = config.encoder.depth if isinstance(config.encoder, RelativeViTConfig) else sum(config.encoder.depths)
    model = SimMIM(64, config)
    assert len(model.blocks()) == depth
    seen: list[int] = []
    for i, block in enumerate(model.blocks()):
        block.register_forward_hook(lambda _m, _i, _o, i=i: seen.append(i))
    sampler = PlanSampler(model.grid, MaskConfig())
    model(torch.randn(1, 3, 64, 64), sampler.stack([sampler(0)]))
    assert seen == list(range(depth))
