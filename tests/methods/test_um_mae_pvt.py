"""UM-MAE on a PVT: the fast path against one written plainly on whole maps."""

from dataclasses import replace

import pytest
import torch

from tests.methods.plain_um_mae_pvt import plain_um_mae_pvt
from ummim.backbones.pvt import PVTConfig
from ummim.errors import RecipeError
from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.methods.um_mae import UMMAE, Config
from ummim.nn.decoder import DecoderConfig

ENCODER = PVTConfig((8, 12, 16, 24), (2, 1, 2, 1), (1, 2, 4, 3), (3.0, 2.0, 2.0, 2.0), (4, 2, 1, 1))
SMALL = Config(ENCODER, DecoderConfig(embed_dim=16, depth=1, num_heads=4))


def job(
    config: Config, image_size: int, secondary: float = 0.25, throw: float = 0.0
) -> tuple[UMMAE, torch.Tensor, MaskPlan]:
    torch.manual_seed(0)
    model = UMMAE(image_size, config, throwing=throw > 0).double()
    for parameter in model.parameters():  # no zero biases: they would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    sampler = PlanSampler(model.grid, MaskConfig("uniform", 0.75, secondary), throw)
    plan = sampler.stack([sampler(seed) for seed in range(2)])
    return model, torch.randn(2, 3, image_size, image_size, dtype=torch.float64), plan


def plain(model: UMMAE, images: torch.Tensor, plan: MaskPlan) -> tuple[torch.Tensor, torch.Tensor]:
    nothing = torch.zeros_like(plan.mask())
    thrown = nothing.scatter(1, plan.thrown, True)
    return plain_um_mae_pvt(model, images, plan.mask(), nothing.scatter(1, plan.visible, plan.secondary), thrown)


@pytest.mark.parametrize(
    ("image_size", "ratios", "secondary", "throw"),
    [
        (128, (4, 2, 1, 1), 0.25, 0.0),
        (128, (4, 2, 1, 1), 0.0, 0.5),
        (64, (8, 4, 2, 1), 0.25, 0.5),  # keys and values pooled to one, a single token in the last stage
        (192, (3, 2, 3, 1), 0.5, 0.3),
    ],
)
def test_equals_the_plain_implementation(
    image_size: int, ratios: tuple[int, int, int, int], secondary: float, throw: float
) -> None:
    config = replace(SMALL, encoder=replace(ENCODER, sr_ratios=ratios))
    model, images, plan = job(config, image_size, secondary, throw)
    loss, prediction = plain(model, images, plan)
    output = model(images, plan)
    torch.testing.assert_close(output.loss, loss, rtol=1e-10, atol=0)
    masked = plan.mask()
    torch.testing.assert_close(output.prediction[masked], prediction[masked], rtol=1e-8, atol=1e-8)
    assert output.prediction[~masked].eq(0).all()


@pytest.mark.parametrize("throw", [0.0, 0.5])
def test_gradients_equal_the_plain_implementations(throw: float) -> None:
    model, images, plan = job(SMALL, 128, throw=throw)
    losses = (model(images, plan).loss, plain(model, images, plan)[0])
    fast, slow = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    torch.testing.assert_close(fast, slow, rtol=1e-7, atol=1e-9)


def test_the_legacy_order_mixes_up_the_visible_positions_only() -> None:
    model, images, plan = job(replace(SMALL, legacy_decoder_order=True, norm_pix_loss=False), 128, throw=0.5)
    legacy = model(images, plan).loss
    torch.testing.assert_close(legacy, plain(model, images, plan)[0], rtol=1e-10, atol=0)
    model.legacy_decoder_order = False
    mended = model(images, plan).loss
    torch.testing.assert_close(mended, plain(model, images, plan)[0], rtol=1e-10, atol=0)
    assert (legacy - mended).abs() > 1e-6


def test_masked_pixels_never_reach_the_encoder() -> None:
    model, images, plan = job(SMALL, 128)
    seen = torch.zeros(2, 64, dtype=torch.bool).scatter(1, plan.visible, ~plan.secondary)
    hidden = ~seen.view(2, 1, 8, 8).repeat_interleave(16, 2).repeat_interleave(16, 3)
    torn = images.masked_fill(hidden, float("nan"))
    assert model.encoder(torn, plan).equal(model.encoder(images, plan))
    assert model(torn, plan).predicted.isfinite().all()


def test_parameter_counts_are_the_official_ones() -> None:
    """All tensors of the state dict, and the trained ones."""
    with torch.device("meta"):
        model = UMMAE(256, Config(PVTConfig()))
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 28_915_776
    assert sum(parameter.numel() for parameter in model.parameters()) == 28_522_560
    assert len(model.blocks()) == 16 + 2


@pytest.mark.parametrize(
    ("encoder", "image_size", "mask", "key", "message"),
    [
        (PVTConfig(), 224, MaskConfig("uniform"), "data.image_size", "use a multiple of 64, such as (192|256)"),
        (PVTConfig(), 256, MaskConfig("random"), "mask.kind", "use uniform"),
        (PVTConfig(sr_ratios=(4, 3, 1, 1)), 256, MaskConfig("uniform"), "method.encoder.sr_ratios", "squares of 3"),
        (PVTConfig(sr_ratios=(4, 2, 1, 0)), 256, MaskConfig("uniform"), "method.encoder.sr_ratios", "squares of 0"),
        (PVTConfig(num_heads=(1, 2, 3, 8)), 256, MaskConfig("uniform"), "method.encoder.num_heads", "3 heads"),
        (PVTConfig((66, 128, 320, 512)), 256, MaskConfig("uniform"), "method.encoder.embed_dims", "multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_name_the_key(
    encoder: PVTConfig, image_size: int, mask: MaskConfig, key: str, message: str
) -> None:
    Config(PVTConfig()).check(256, MaskConfig("uniform", 0.75, 0.25), 0.5)
    with pytest.raises(RecipeError, match=message) as error:
        Config(encoder).check(image_size, mask, 0.0)
    assert error.value.key == key
