"""MAE's fast path against MAE written plainly."""

import pytest
import torch

from tests.methods.plain_methods import plain_mae
from ummim.backbones.vit import ViTConfig
from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.methods.mae import MAE, Config
from ummim.nn.decoder import DecoderConfig
from ummim.nn.targets import patchify

SMALL = Config(
    encoder=ViTConfig(patch_size=4, embed_dim=24, depth=2, num_heads=3),
    decoder=DecoderConfig(embed_dim=16, depth=2, num_heads=4),
)


def job(config: Config, image_size: int, mask: MaskConfig, throw: float) -> tuple[MAE, torch.Tensor, MaskPlan]:
    torch.manual_seed(0)
    model = MAE(image_size, config, throwing=throw > 0).double()
    for parameter in model.parameters():  # no zero biases: they would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    sampler = PlanSampler(model.grid, mask, throw)
    plan = sampler.stack([sampler(seed) for seed in range(3)])
    return model, torch.randn(3, 3, image_size, image_size, dtype=torch.float64), plan


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize(
    ("image_size", "mask", "throw"),
    [
        (24, MaskConfig(), 0.0),
        (24, MaskConfig(), 0.5),
        (20, MaskConfig("random", 0.6), 0.3),
        (32, MaskConfig("uniform"), 0.0),
        (32, MaskConfig("uniform"), 0.5),
        (28, MaskConfig("random", 0.75, throwing="random"), 0.65),
    ],
)
def test_equals_the_plain_implementation(image_size: int, mask: MaskConfig, throw: float, norm_pix: bool) -> None:
    config = Config(SMALL.encoder, SMALL.decoder, norm_pix)
    model, images, plan = job(config, image_size, mask, throw)
    masked = plan.mask()
    thrown = torch.zeros_like(masked).scatter(1, plan.thrown, True)
    loss, prediction = plain_mae(model, images, masked, thrown)
    output = model(images, plan)
    torch.testing.assert_close(output.loss, loss, rtol=1e-11, atol=0)
    torch.testing.assert_close(output.prediction[masked], prediction[masked], rtol=1e-9, atol=1e-9)
    assert output.prediction[~masked].eq(0).all()


def test_gradients_equal_the_plain_implementations() -> None:
    model, images, plan = job(SMALL, 24, MaskConfig(), 0.5)
    masked = plan.mask()
    thrown = torch.zeros_like(masked).scatter(1, plan.thrown, True)
    losses = (model(images, plan).loss, plain_mae(model, images, masked, thrown)[0])
    fast, plain = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    torch.testing.assert_close(fast, plain, rtol=1e-8, atol=1e-10)


def test_the_loss_ignores_visible_pixels_as_targets() -> None:
    """Raw targets: a visible patch enters through the encoder alone, so freeze that and change its pixels."""
    model, images, plan = job(Config(SMALL.encoder, SMALL.decoder, False), 24, MaskConfig(), 0.0)
    torch.nn.init.zeros_(model.encoder.patch_embed.proj.weight)
    before = model(images, plan).loss
    pixels = (~plan.mask()).view(3, 1, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert model(images + 5.0 * pixels, plan).loss == before
    assert model(images + 5.0 * ~pixels, plan).loss != before


@pytest.mark.parametrize("throw", [0.0, 0.5])
def test_the_loss_is_the_mean_over_masked_patches_only(throw: float) -> None:
    """Of squared errors, over all samples, masked patches and their pixels; visible patches have no part."""
    model, images, plan = job(Config(SMALL.encoder, SMALL.decoder, False), 24, MaskConfig(), throw)
    output, masked = model(images, plan), plan.mask()
    errors = (output.prediction - patchify(images, 4)).square()  # (B, N, P)
    assert int(masked.sum()) == 3 * 27
    torch.testing.assert_close(output.loss, errors[masked].sum() / (3 * 27 * 48), rtol=1e-12, atol=0)
    assert (output.loss - errors.mean()).abs() > 0.01


def test_masked_pixels_never_reach_the_encoder() -> None:
    model, images, plan = job(SMALL, 24, MaskConfig(), 0.5)
    hidden = plan.mask().view(3, 1, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    torn = images.masked_fill(hidden, float("nan"))
    assert model.encoder(torn, plan).equal(model.encoder(images, plan))
    assert model(torn, plan).predicted.isfinite().all()
    assert model(torn, plan).loss.isnan()  # the targets are the masked pixels
