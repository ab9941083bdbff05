"""UM-MAE's fast path against UM-MAE written plainly, window by window on true coordinates."""

from dataclasses import replace

import pytest
import torch

from tests.methods.plain_methods import embed_map, plain_um_mae, swin_stages
from ummim.backbones.swin import SwinConfig
from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.methods.um_mae import UMMAE, Config
from ummim.nn.decoder import DecoderConfig

ENCODER = SwinConfig(embed_dim=8, depths=(2, 2, 3, 2), num_heads=(1, 2, 2, 4), pos_mlp_dim=6)
SMALL = Config(ENCODER, DecoderConfig(embed_dim=16, depth=1, num_heads=4))


def job(
    config: Config, image_size: int, secondary: float = 0.25, throw: float = 0.0, batch: int = 2
) -> tuple[UMMAE, torch.Tensor, MaskPlan]:
    torch.manual_seed(0)
    model = UMMAE(image_size, config, throwing=throw > 0).double()
    for parameter in model.parameters():  # no zero biases: they would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    sampler = PlanSampler(model.grid, MaskConfig("uniform", 0.75, secondary), throw)
    plan = sampler.stack([sampler(seed) for seed in range(batch)])
    return model, torch.randn(batch, 3, image_size, image_size, dtype=torch.float64), plan


def plain(model: UMMAE, images: torch.Tensor, plan: MaskPlan) -> tuple[torch.Tensor, torch.Tensor]:
    masked = plan.mask()
    nothing = torch.zeros_like(masked)
    thrown = nothing.scatter(1, plan.thrown, True)
    return plain_um_mae(model, images, masked, nothing.scatter(1, plan.visible, plan.secondary), thrown)


@pytest.mark.parametrize(
    ("image_size", "window", "secondary", "throw"),
    [
        (128, 8, 0.25, 0.0),  # maps 16, 8, 4, 2: shifted in the first stage only
        (128, 8, 0.0, 0.5),
        (128, 2, 0.25, 0.5),  # windows inside the 4x4 tiles of a patch, shifted in three stages
        (128, 4, 0.25, 0.0),  # windows are those tiles; shifted ones straddle four
        (192, 6, 0.25, 0.3),  # windows cut through tiles
        (192, 12, 0.5, 0.0),
        (192, 3, 0.25, 0.0),  # an odd window, shifted by one
        (256, 16, 0.25, 0.0),
        (64, 8, 0.25, 0.5),  # one window everywhere, a single token in the last stage
    ],
)
def test_equals_the_plain_implementation(image_size: int, window: int, secondary: float, throw: float) -> None:
    config = replace(SMALL, encoder=replace(ENCODER, window_size=window))
    model, images, plan = job(config, image_size, secondary, throw)
    loss, prediction = plain(model, images, plan)
    output = model(images, plan)
    torch.testing.assert_close(output.loss, loss, rtol=1e-10, atol=0)
    masked = plan.mask()
    torch.testing.assert_close(output.prediction[masked], prediction[masked], rtol=1e-8, atol=1e-8)
    assert output.prediction[~masked].eq(0).all()


@pytest.mark.parametrize("throw", [0.0, 0.5])
def test_the_legacy_order_mixes_up_the_visible_positions_only(throw: float) -> None:
    model, images, plan = job(replace(SMALL, legacy_decoder_order=True, norm_pix_loss=False), 128, throw=throw)
    legacy = model(images, plan).loss
    torch.testing.assert_close(legacy, plain(model, images, plan)[0], rtol=1e-10, atol=0)
    model.legacy_decoder_order = False
    mended = model(images, plan).loss
    torch.testing.assert_close(mended, plain(model, images, plan)[0], rtol=1e-10, atol=0)
    assert (legacy - mended).abs() > 1e-6


def test_gradients_equal_the_plain_implementations() -> None:
    model, images, plan = job(SMALL, 128, throw=0.5)
    losses = (model(images, plan).loss, plain(model, images, plan)[0])
    fast, slow = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    torch.testing.assert_close(fast, slow, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("image_size", "window"), [(64, 8), (96, 3), (128, 4)])
def test_a_dense_image_equals_the_plain_implementation(image_size: int, window: int) -> None:
    """The exported encoder sees whole images: no plan, the same weights."""
    config = replace(SMALL, encoder=replace(ENCODER, window_size=window))
    model, images, _ = job(config, image_size)
    expected = torch.stack([swin_stages(model.encoder, *embed_map(model.encoder, image)) for image in images])
    torch.testing.assert_close(model.encoder(images), expected, rtol=1e-9, atol=1e-9)


def test_masked_and_secondary_pixels_never_reach_the_encoder() -> None:
    model, images, plan = job(SMALL, 128)
    seen = torch.zeros(2, 64, dtype=torch.bool).scatter(1, plan.visible, ~plan.secondary)
    hidden = ~seen.view(2, 1, 8, 8).repeat_interleave(16, 2).repeat_interleave(16, 3)
    torn = images.masked_fill(hidden, float("nan"))
    assert model.encoder(torn, plan).equal(model.encoder(images, plan))
    assert model(torn, plan).predicted.isfinite().all()


def test_only_visible_patches_are_embedded() -> None:
    model, images, plan = job(SMALL, 128)
    tokens: list[int] = []
    model.encoder.patch_embed.proj.register_forward_hook(lambda _m, _i, out: tokens.append(out[..., 0].numel()))
    model(images, plan)
    assert tokens == [2 * 16 * 16]  # a quarter of 2 x 32 x 32


def test_a_plan_that_is_not_uniform_is_refused() -> None:
    model, images, _ = job(SMALL, 128)
    sampler = PlanSampler((8, 8), MaskConfig())
    with pytest.raises(ValueError, match="uniform plan"):
        model(images, sampler.stack([sampler(seed) for seed in range(2)]))
