"""PR-MIM on MAE and UM-MAE, whole steps: what throwing changes, and what it must not."""

from typing import Any

import pytest
import torch

from ummim.backbones.swin import SwinConfig
from ummim.backbones.vit import ViTConfig
from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.methods import mae, um_mae
from ummim.methods.api import MethodConfig
from ummim.nn.aggregation import PartialConfig, SpatialAggregation
from ummim.nn.decoder import DecoderConfig
from ummim.nn.layers import take
from ummim.nn.targets import normalise_patches, patchify

DECODER = DecoderConfig(embed_dim=16, depth=2, num_heads=4)
METHODS = {
    "mae": (
        mae.Config(ViTConfig(patch_size=4, embed_dim=24, depth=2, num_heads=3), DECODER),
        24,
        MaskConfig(),
    ),
    "um_mae": (
        um_mae.Config(SwinConfig(8, (1, 1, 2, 1), (1, 2, 2, 4), pos_mlp_dim=6), DECODER),
        128,
        MaskConfig("uniform", 0.75, 0.25),
    ),
}


def plan_for(name: str, throw: float, throwing: str = "furthest") -> MaskPlan:
    config, size, mask = METHODS[name]
    drawn = MaskConfig(mask.kind, mask.ratio, mask.secondary_ratio, throwing)  # type: ignore[arg-type]
    sampler = PlanSampler(config.mask_grid(size), drawn, throw)
    return sampler.stack([sampler(seed) for seed in range(2)])


def build(name: str, aggregation: str = "conv", throwing: bool = True) -> tuple[Any, torch.Tensor]:
    config: MethodConfig
    config, size, _ = METHODS[name]
    torch.manual_seed(0)
    model = config.build(size, PartialConfig(aggregation), throwing).double()  # type: ignore[arg-type]
    return model, torch.randn(2, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize("name", METHODS)
def test_at_ratio_zero_the_loss_is_the_plain_methods(name: str) -> None:
    plain, images = build(name, throwing=False)
    partial, _ = build(name)
    partial.load_state_dict(plain.state_dict(), strict=False)
    assert isinstance(partial.aggregation, SpatialAggregation)
    plan = plan_for(name, 0.0)
    assert partial(images, plan).loss == plain(images, plan).loss


@pytest.mark.parametrize("name", METHODS)
def test_the_method_without_throwing_has_no_parameter_of_it(name: str) -> None:
    plain, partial = (build(name, throwing=throwing)[0].state_dict() for throwing in (False, True))
    assert partial.keys() - plain.keys() == {"aggregation.layer.weight", "aggregation.layer.bias"}
    assert partial["aggregation.layer.weight"].shape == (16, 1, 7, 7)


@pytest.mark.parametrize("throwing", ["furthest", "random"])
@pytest.mark.parametrize("name", METHODS)
def test_at_half_every_masked_token_gets_gradient(name: str, throwing: str) -> None:
    model, images = build(name)
    plan = plan_for(name, 0.5, throwing)
    assert plan.thrown.shape[1] == int(0.5 * plan.mask().shape[1])
    output = model(images, plan)
    output.predicted.retain_grad()
    output.loss.backward()
    assert output.ids.sort(1).values.equal(plan.masked.sort(1).values)
    assert output.predicted.grad.abs().amax(2).gt(0).all()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        if not key.endswith("posmlp.2.bias"):  # shifts all logits alike, so softmax hides it
            assert parameter.grad.abs().gt(0).any(), key


@pytest.mark.parametrize("name", METHODS)
def test_thrown_tokens_teach_the_decoder_through_the_aggregation(name: str) -> None:
    """The loss on thrown tokens alone reaches every kept token that the decoder made."""
    model, images = build(name)
    plan = plan_for(name, 0.5)
    decoded: list[torch.Tensor] = []
    model.decoder.register_forward_hook(lambda _module, _inputs, output: decoded.extend(output))
    output = model(images, plan)
    visible, kept = decoded
    thrown_only = output.predicted[:, plan.kept.shape[1] :].square().sum()
    for grad in torch.autograd.grad(thrown_only, [visible, kept]):
        assert grad.abs().amax(2).gt(0).all()


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_the_mean_over_all_masked_tokens(name: str) -> None:
    model, images = build(name)
    kept_only, _ = build(name, aggregation="none")
    kept_only.load_state_dict(model.state_dict(), strict=False)
    plan = plan_for(name, 0.5)
    kept, thrown = plan.kept.shape[1], plan.thrown.shape[1]
    part = kept_only(images, plan)
    assert part.ids.equal(plan.kept)
    whole = model(images, plan)
    # Kept tokens do not feel the aggregation; the head's product of more rows may round otherwise (by the BLAS).
    torch.testing.assert_close(whole.predicted[:, :kept], part.predicted, rtol=1e-13, atol=1e-14)
    pixels = patchify(images, model.patch_size)
    if model.norm_pix_loss:
        pixels = normalise_patches(pixels)[0]
    expected = (whole.predicted - take(pixels, whole.ids)).square().mean()
    torch.testing.assert_close(whole.loss, expected, rtol=1e-12, atol=0)
    errors = whole.loss * (kept + thrown) - part.loss * kept  # what is left belongs to the thrown ones
    swapped = MaskPlan(plan.grid, plan.visible, plan.secondary, plan.kept, plan.thrown.flip(1), plan.compact)
    torch.testing.assert_close(model(images, swapped).loss * (kept + thrown) - part.loss * kept, errors)
    assert errors > 0


@pytest.mark.parametrize("name", METHODS)
def test_predictions_lie_at_the_masked_tokens_in_raster_order(name: str) -> None:
    model, images = build(name)
    plan = plan_for(name, 0.5)
    output = model(images, plan)
    h, w = plan.grid
    assert output.prediction.shape == (2, h * w, model.patch_size**2 * 3)
    for b in range(2):
        assert output.prediction[b, output.ids[b]].equal(output.predicted[b])
    assert output.prediction[~plan.mask()].eq(0).all()
