"""AMT on MAE and SimMIM against AMT written plainly, and its attention maps."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.methods.plain_amt import plain_amt, plain_attention_map
from ummim.backbones.relative_vit import RelativeViTConfig
from ummim.backbones.vit import ViTConfig
from ummim.errors import RecipeError
from ummim.masking import AttentionMaskConfig, AttentionSampler, MaskConfig, MaskPlan, PlanSampler
from ummim.methods import mae, simmim
from ummim.methods.amt import AMTMAE, AMTSimMIM, Config, class_attention
from ummim.nn.aggregation import PartialConfig
from ummim.nn.decoder import DecoderConfig
from ummim.recipe_file import load_recipe

MAE = Config(ViTConfig(patch_size=4, embed_dim=24, depth=2, num_heads=3), DecoderConfig(16, 2, 4))
RELATIVE = RelativeViTConfig(patch_size=4, embed_dim=24, depth=2, num_heads=3, drop_path=0.0, absolute_position=True)
ABSOLUTE = replace(RELATIVE, relative_position=False)
SIMMIM = Config(ABSOLUTE, attention=AttentionMaskConfig(masked=0.44, thrown=0.26, unit=2))
CONFIGS = {
    "mae": MAE,
    "mae, norm-pix": replace(MAE, norm_pix_loss=True),
    "mae, thrown only a little": replace(MAE, attention=AttentionMaskConfig(masked=0.7, thrown=0.05)),
    "mae, nothing thrown": replace(MAE, attention=AttentionMaskConfig(masked=0.75, thrown=0.0)),
    "simmim": SIMMIM,
    "simmim, norm-pix": replace(SIMMIM, norm_pix_loss=True),
    "simmim, relative positions too": replace(SIMMIM, encoder=RELATIVE),
    "simmim, single tokens": replace(SIMMIM, attention=AttentionMaskConfig()),
}


def job(config: Config) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = config.build(24, PartialConfig(), False).double()
    for parameter in model.parameters():  # no zero tables and biases: they would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return model, torch.randn(3, 3, 24, 24, dtype=torch.float64)


def plan_for(config: Config, seed: int = 0) -> MaskPlan:
    sampler = AttentionSampler((6, 6), config.attention)
    rng = np.random.default_rng(seed)
    return sampler.stack([sampler(3 * seed + i, rng.random((6, 6))) for i in range(3)])


def mask_of(ids: Tensor) -> Tensor:
    return torch.zeros(len(ids), 36, dtype=torch.bool).scatter(1, ids, True)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_plain_implementation(name: str) -> None:
    model, images = job(CONFIGS[name])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for seed in range(3):
        plan = plan_for(CONFIGS[name], seed)
        loss, prediction = plain_amt(model, images, mask_of(plan.kept), mask_of(plan.thrown))
        output = model(images, plan)
        torch.testing.assert_close(output.loss, loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(output.prediction, prediction, rtol=1e-8, atol=1e-9)
        fast, slow = (torch.autograd.grad(each, parameters) for each in (output.loss, loss))
        torch.testing.assert_close(fast, slow, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_before_the_first_refresh_it_is_the_method_under_its_plain_mask(name: str) -> None:
    config = CONFIGS[name]
    model, images = job(config)
    torch.manual_seed(1)
    plain = config.framework.build(24, PartialConfig(), False).double()
    assert type(plain) in (mae.MAE, simmim.SimMIM)
    plain.load_state_dict(model.state_dict())  # the weights are the method's, no more and no less
    sampler = PlanSampler((6, 6), MaskConfig())
    plan = sampler.stack([sampler(seed) for seed in range(3)])
    assert model(images, plan).loss == plain(images, plan).loss


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_thrown_pixels_go_nowhere_and_masked_ones_are_targets_only(name: str) -> None:
    model, images = job(CONFIGS[name])
    plan = plan_for(CONFIGS[name])
    before = model(images, plan)

    def pixels(ids: Tensor) -> Tensor:
        return mask_of(ids).view(3, 1, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)

    without_thrown = model(images.masked_fill(pixels(plan.thrown), float("nan")), plan)
    assert without_thrown.loss == before.loss
    assert without_thrown.predicted.equal(before.predicted)
    without_masked = model(images.masked_fill(pixels(plan.kept), float("nan")), plan)
    assert without_masked.predicted.equal(before.predicted)
    assert without_masked.loss.isnan()


def test_thrown_tokens_are_in_no_sequence() -> None:
    """At the published sizes: 31 tokens encoded and 119 decoded of MAE's 197; 145 of SimMIM's, class token included."""
    lengths: list[int] = []
    simmim_plan = AttentionSampler((14, 14), SIMMIM.attention)
    mae_plan = AttentionSampler((14, 14), MAE.attention)
    for config, sampler in ((MAE, mae_plan), (SIMMIM, simmim_plan)):
        model = config.build(56, PartialConfig(), False)
        for block in model.blocks():
            block.register_forward_hook(lambda _m, inputs, _o: lengths.append(inputs[0].shape[1]))
        model(torch.randn(1, 3, 56, 56), sampler.stack([sampler(0, np.ones((14, 14)))]))
    assert lengths == [31, 31, 119, 119, 145, 145]


@pytest.mark.parametrize("name", ["mae", "simmim", "simmim, relative positions too"])
def test_the_forward_is_one_graph_for_every_plan(name: str, fresh_compiler: None) -> None:
    model, images = job(CONFIGS[name])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 4):
            plan = plan_for(CONFIGS[name], seed)
            torch.testing.assert_close(compiled(images, plan).loss, model(images, plan).loss)


@pytest.mark.parametrize("name", ["mae", "simmim", "simmim, relative positions too"])
def test_attention_maps_equal_those_from_whole_attention_matrices(name: str) -> None:
    model, images = job(CONFIGS[name])
    maps = model.attention_map(images)
    assert maps.shape == (3, 6, 6)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    expected = torch.stack([plain_attention_map(model, image) for image in images])
    torch.testing.assert_close(maps.double(), expected, rtol=1e-4, atol=1e-5)
    assert 0 <= maps.min() < 0.5 < maps.max() <= 1


def test_attention_maps_leave_nothing_behind() -> None:
    model, images = job(MAE)
    with pytest.raises(RuntimeError):
        model.attention_map(images[:, :2])
    model.attention_map(images)
    assert not model.encoder.blocks[-1].attn.qkv._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attention_that_is_even_gives_no_weight_instead_of_nan() -> None:
    maps = class_attention(torch.ones(2, 5, 12), 2)
    assert maps.eq(0).all()
    half = class_attention(torch.randn(2, 5, 12, dtype=torch.bfloat16), 2)
    assert half.dtype == torch.float32
    assert half.isfinite().all()


def test_attention_maps_in_16_bits_are_close() -> None:
    model, images = job(MAE)
    exact = model.attention_map(images)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    rounded = model.attention_map(images.float())
    assert (rounded - exact).abs().max() < 0.1


def test_the_encoders_kind_decides_the_method() -> None:
    assert isinstance(MAE.build(24, PartialConfig(), False), AMTMAE)
    assert isinstance(SIMMIM.build(24, PartialConfig(), False), AMTSimMIM)
    assert MAE.mask_grid(24) == SIMMIM.mask_grid(24) == (6, 6)


@pytest.mark.parametrize(
    ("recipe", "kinds"),
    [("amt_mae_vit_base_400e", (AMTMAE, (30, 88, 78))), ("amt_simmim_vit_base_200e", (AMTSimMIM, (56, 88, 52)))],
)
def test_packaged_recipes_have_the_published_counts(recipe: str, kinds: Any) -> None:
    loaded = load_recipe(recipe)
    assert loaded.method.attention is not None
    sampler = AttentionSampler(loaded.method.mask_grid(224), loaded.method.attention)
    assert (sampler.visible_count, sampler.kept_count, sampler.thrown_count) == kinds[1]
    with torch.device("meta"):
        model = loaded.method.build(224, PartialConfig(), False)
    assert isinstance(model, kinds[0])


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("throw_ratio=0.5", "throw_ratio", "AMT throws by itself: set method.attention.thrown"),
        ("mask.kind=uniform", "mask.kind", "amt cannot train under a uniform mask"),
        ("mask.secondary_ratio=0.25", "mask.secondary_ratio", "no token for"),
        ("method.attention.refresh_epochs=0", "method.attention.refresh_epochs", "at least 1"),
        ("method.attention.unit=4", "method.attention.unit", "units of 4 tokens do not tile the grid 14x14"),
        ("method.attention.unit=0", "method.attention.unit", "units of 0 tokens"),
        ("method.attention.masked=0", "method.attention.masked", "between 0 and 1"),
        ("method.attention.masked=0.001", "method.attention.masked", "leave 0 masked .* further from 0 and 1"),
        ("method.attention.thrown=0.0001", "method.attention.thrown", "throws none of 196 tokens, choose a larger"),
        ("method.attention.thrown=-0.1", "method.attention.thrown", "from 0 to below 1"),
        ("method.attention.thrown=0.6", "method.attention.thrown", "visible of 196 tokens: .* must stay below 1"),
        ("method.encoder.num_heads=7", "method.encoder.num_heads", "7 heads do not divide"),
        ("data.crop=padded", "data.crop", "resized crops only"),
    ],
)
def test_what_cannot_run_is_refused_by_its_key(override: str, key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("amt_mae_vit_base_400e", [override])
    assert caught.value.key == key
