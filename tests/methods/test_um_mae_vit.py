"""UM-MAE on a ViT: the fast path against one written plainly."""

from dataclasses import replace

import pytest
import torch

from tests.methods.plain_methods import plain_mae
from tests.methods.plain_um_mae_vit import plain_um_mae_vit
from ummim.backbones.vit import ViTConfig
from ummim.errors import RecipeError
from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.methods import mae
from ummim.methods.um_mae import UMMAE, Config
from ummim.nn.decoder import DecoderConfig

ENCODER = ViTConfig(patch_size=4, embed_dim=24, depth=2, num_heads=3)
SMALL = Config(ENCODER, DecoderConfig(embed_dim=16, depth=2, num_heads=4))


def job(mask: MaskConfig, throw: float = 0.0, config: Config = SMALL) -> tuple[UMMAE, torch.Tensor, MaskPlan]:
    torch.manual_seed(0)
    model = UMMAE(32, config, throwing=throw > 0).double()
    for parameter in model.parameters():  # no zero biases: they would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    sampler = PlanSampler(model.grid, mask, throw)
    plan = sampler.stack([sampler(seed) for seed in range(3)])
    return model, torch.randn(3, 3, 32, 32, dtype=torch.float64), plan


def plain(model: UMMAE, images: torch.Tensor, plan: MaskPlan) -> tuple[torch.Tensor, torch.Tensor]:
    nothing = torch.zeros_like(plan.mask())
    thrown = nothing.scatter(1, plan.thrown, True)
    return plain_um_mae_vit(model, images, plan.mask(), nothing.scatter(1, plan.visible, plan.secondary), thrown)


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize(
    ("mask", "throw"),
    [
        (MaskConfig("uniform", 0.75, 0.25), 0.0),
        (MaskConfig("uniform", 0.75, 0.25), 0.5),
        (MaskConfig("uniform", 0.75, 0.0), 0.0),
        (MaskConfig("random", 0.75, 0.25), 0.25),
        (MaskConfig("random", 0.6, 0.5), 0.0),
    ],
)
def test_equals_the_plain_implementation(mask: MaskConfig, throw: float, norm_pix: bool) -> None:
    model, images, plan = job(mask, throw, replace(SMALL, norm_pix_loss=norm_pix))
    loss, prediction = plain(model, images, plan)
    output = model(images, plan)
    torch.testing.assert_close(output.loss, loss, rtol=1e-11, atol=0)
    masked = plan.mask()
    torch.testing.assert_close(output.prediction[masked], prediction[masked], rtol=1e-9, atol=1e-9)
    assert output.prediction[~masked].eq(0).all()


@pytest.mark.parametrize("throw", [0.0, 0.5])
def test_gradients_equal_the_plain_implementations(throw: float) -> None:
    model, images, plan = job(MaskConfig("uniform", 0.75, 0.25), throw)
    losses = (model(images, plan).loss, plain(model, images, plan)[0])
    fast, slow = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-10)


def test_without_secondary_masking_it_is_mae() -> None:
    model, images, plan = job(MaskConfig())
    expected = plain_mae(model, images, plan.mask(), torch.zeros_like(plan.mask()))[0]
    torch.testing.assert_close(model(images, plan).loss, expected, rtol=1e-11, atol=0)
    own, other = model.state_dict(), mae.MAE(32, mae.Config(ENCODER, SMALL.decoder)).state_dict()
    assert own.keys() - other.keys() == {"encoder.vis_mask_token"}
    assert not other.keys() - own.keys()


def test_secondary_pixels_never_reach_the_encoder() -> None:
    model, images, plan = job(MaskConfig("uniform", 0.75, 0.25))
    seen = torch.zeros(3, 64, dtype=torch.bool).scatter(1, plan.visible, ~plan.secondary)
    hidden = ~seen.view(3, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert model.encoder(images.masked_fill(hidden, float("nan")), plan).equal(model.encoder(images, plan))


def test_masks_and_orders_that_a_vit_has() -> None:
    SMALL.check(32, MaskConfig("random", 0.6, 0.25), 0.5)
    SMALL.check(32, MaskConfig("uniform", 0.75, 0.25), 0.5)
    with pytest.raises(RecipeError, match="set it to false") as error:
        replace(SMALL, legacy_decoder_order=True).check(32, MaskConfig(), 0.0)
    assert error.value.key == "method.legacy_decoder_order"
