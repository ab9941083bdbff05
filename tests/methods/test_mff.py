"""MFF's fast path against MFF written plainly, its fusion, and the recipes that it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.methods.plain_mff import plain_mff
from ummim.backbones.vit import ViTConfig
from ummim.errors import RecipeError
from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.methods.mff import MFF, Config, Fusion
from ummim.nn.decoder import DecoderConfig
from ummim.recipe_file import dump_recipe, load_recipe

SMALL = Config(
    encoder=ViTConfig(patch_size=4, embed_dim=24, depth=5, num_heads=3),
    decoder=DecoderConfig(embed_dim=16, depth=2, num_heads=4),
    taps=(0, 2, 4),
)


def job(config: Config, mask: MaskConfig, throw: float) -> tuple[MFF, torch.Tensor, MaskPlan]:
    torch.manual_seed(0)
    model = MFF(24, config, throwing=throw > 0).double()
    for parameter in model.parameters():  # no zero biases, no equal weights: they would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    sampler = PlanSampler(model.grid, mask, throw)
    plan = sampler.stack([sampler(seed) for seed in range(3)])
    return model, torch.randn(3, 3, 24, 24, dtype=torch.float64), plan


def plain(model: MFF, images: torch.Tensor, plan: MaskPlan) -> tuple[torch.Tensor, torch.Tensor]:
    masked = plan.mask()
    return plain_mff(model, images, masked, torch.zeros_like(masked).scatter(1, plan.thrown, True))


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("taps", [(0, 2, 4), (0, 1, 2, 3, 4), (4,), (1, 3)])
@pytest.mark.parametrize(("mask", "throw"), [(MaskConfig(), 0.0), (MaskConfig("random", 0.6), 0.3)])
def test_equals_the_plain_implementation(mask: MaskConfig, throw: float, taps: tuple[int, ...], norm_pix: bool) -> None:
    model, images, plan = job(replace(SMALL, taps=taps, norm_pix_loss=norm_pix), mask, throw)
    loss, prediction = plain(model, images, plan)
    output = model(images, plan)
    torch.testing.assert_close(output.loss, loss, rtol=1e-11, atol=0)
    masked = plan.mask()
    torch.testing.assert_close(output.prediction[masked], prediction[masked], rtol=1e-9, atol=1e-9)
    assert output.prediction[~masked].eq(0).all()


@pytest.mark.parametrize("throw", [0.0, 0.5])
def test_gradients_equal_the_plain_implementations(throw: float) -> None:
    model, images, plan = job(SMALL, MaskConfig(), throw)
    losses = (model(images, plan).loss, plain(model, images, plan)[0])
    fast, slow = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-10)


def test_fusion_starts_as_an_even_mean_and_its_weights_add_up_to_one() -> None:
    fusion = Fusion(4, 3)
    for name, parameter in fusion.named_parameters():
        if name.endswith(".weight"):
            torch.nn.init.eye_(parameter)
    layers = [torch.randn(2, 5, 4) for _ in range(3)]
    torch.testing.assert_close(fusion(layers), torch.stack(layers).mean(0))
    torch.nn.init.normal_(fusion.proj_weights, std=3.0)
    torch.testing.assert_close(fusion([layers[0]] * 3), layers[0])


def test_fresh_weights_are_mmpretrains() -> None:
    torch.manual_seed(0)
    model: Any = MFF(24, SMALL)
    assert model.fusion.proj_weights.eq(1).all()
    assert model.fusion.proj_layers[0].bias.eq(0).all()
    bound = (6 / (24 + 24)) ** 0.5  # Xavier
    assert 0.95 * bound < model.fusion.proj_layers[0].weight.abs().max() <= bound
    for block in model.encoder.blocks:
        for bias in (block.mlp.fc1.bias, block.mlp.fc2.bias):
            assert 0 < bias.abs().max() < 5e-6
        assert block.attn.qkv.bias.eq(0).all()
    assert all(block.mlp.fc1.bias.eq(0).all() for block in model.decoder.blocks)


def test_without_projections_and_lower_weights_it_is_mae() -> None:
    from ummim.methods import mae

    model, images, plan = job(SMALL, MaskConfig(), 0.5)
    with torch.no_grad():
        model.fusion.proj_weights[:2] = -1e9
    same = mae.MAE(24, mae.Config(SMALL.encoder, SMALL.decoder), throwing=True).double()
    same.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("fusion.")})
    torch.testing.assert_close(model(images, plan).loss, same(images, plan).loss, rtol=1e-12, atol=0)


def test_masked_pixels_never_reach_the_encoder() -> None:
    model, images, plan = job(SMALL, MaskConfig(), 0.5)
    hidden = plan.mask().view(3, 1, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert model(images.masked_fill(hidden, float("nan")), plan).predicted.isfinite().all()


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        ({"taps": ()}, "method.taps", "ascending"),
        ({"taps": (2, 0, 4)}, "method.taps", "ascending"),
        ({"taps": (0, 0, 4)}, "method.taps", "ascending"),
        ({"taps": (-1, 4)}, "method.taps", "0 to 4"),
        ({"taps": (0, 5)}, "method.taps", "0 to 4"),
        ({"taps": (0, 3)}, "method.taps", "would not be trained: end with 4"),
        ({"encoder": replace(SMALL.encoder, num_heads=5)}, "method.encoder.num_heads", "5 heads"),
        ({"encoder": replace(SMALL.encoder, patch_size=5)}, "data.image_size", "multiple of the patch size 5"),
    ],
)
def test_sizes_that_do_not_fit_name_the_key(change: dict, key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        replace(SMALL, **change).check(24, MaskConfig(), 0.0)
    assert error.value.key == key


def test_the_recipe_is_mmpretrains(tmp_path) -> None:
    recipe = load_recipe("mff_vit_base_800e", ["method.encoder.depth=4", "method.taps=[1, 3]"])
    assert isinstance(recipe.method, Config)
    assert recipe.method.taps == (1, 3)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe
    assert (recipe.data.crop, recipe.data.interpolation, recipe.seed) == ("padded", "bilinear", 2)
    partial = load_recipe("pr_mff_vit_base_800e")
    assert isinstance(partial.method, Config)
    assert partial.method.taps == (0, 2, 4, 6, 8, 11)
    assert (partial.throw_ratio, partial.data.crop) == (0.5, "padded")
