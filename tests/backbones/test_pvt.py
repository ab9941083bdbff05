"""The PVT encoder, compact and whole; its numbers against a plain one."""

from typing import Any

import pytest
import torch

from tests.methods.plain_um_mae_pvt import embed_pvt, pvt_stages
from ummim.backbones.pvt import PVT, PVTConfig
from ummim.backbones.pyramid import Hiding
from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.nn.layers import sincos_table

CONFIG = PVTConfig((8, 12, 16, 24), (1, 2, 1, 1), (1, 2, 4, 3), (2.0, 2.0, 2.0, 2.0), (4, 2, 1, 1))


def job(hiding: Hiding = "compact", secondary: float = 0.25) -> tuple[PVT, torch.Tensor, MaskPlan]:
    torch.manual_seed(0)
    encoder = PVT(128, CONFIG, hiding).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mask = MaskConfig("uniform", 0.75, secondary) if hiding == "compact" else MaskConfig("random", 0.6)
    sampler = PlanSampler(encoder.grid, mask)
    plan = sampler.stack([sampler(seed) for seed in (1, 2)])
    return encoder, torch.randn(2, 3, 128, 128, dtype=torch.float64), plan


def test_a_plan_halves_the_map_and_none_keeps_it() -> None:
    encoder, images, plan = job()
    assert encoder(images, plan).shape == (2, 2, 2, 24)
    assert encoder(images).shape == (2, 4, 4, 24)
    replacing, _, plan = job("replace")
    assert replacing(images, plan).shape == (2, 4, 4, 24)


@pytest.mark.parametrize("hiding", ["compact", "replace"])
def test_a_whole_image_equals_the_plain_implementation(hiding: Hiding) -> None:
    encoder, images, _ = job(hiding)
    expected = torch.stack([pvt_stages(encoder, embed_pvt(encoder, image)) for image in images])
    torch.testing.assert_close(encoder(images), expected, rtol=1e-9, atol=1e-9)


def test_masked_patches_become_the_mask_token_and_keep_their_position() -> None:
    encoder, images, plan = job("replace")
    expected = torch.stack(
        [
            pvt_stages(encoder, embed_pvt(encoder, image, hidden, encoder.mask_token))
            for image, hidden in zip(images, plan.mask(), strict=True)
        ]
    )
    found = encoder(images, plan)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    fast, plain = (torch.autograd.grad(x.square().sum(), list(encoder.parameters())) for x in (found, expected))
    torch.testing.assert_close(fast, plain, rtol=1e-7, atol=1e-8)


def test_masked_patches_are_not_read() -> None:
    for hiding in ("compact", "replace"):
        encoder, images, plan = job(hiding, secondary=0.0)
        hidden = plan.mask().view(2, 1, 8, 8).repeat_interleave(16, 2).repeat_interleave(16, 3)
        assert encoder(images.masked_fill(hidden, float("nan")), plan).isfinite().all()


def test_which_tokens_there_are() -> None:
    for arguments, tokens in (
        ({}, {"vis_mask_token"}),
        ({"secondary": False}, set()),
        ({"hiding": "replace"}, {"mask_token"}),
    ):
        names = {name for name, _ in PVT(64, CONFIG, **arguments).named_parameters()}
        assert {name for name in names if "token" in name} == tokens


def test_norms_have_the_official_epsilons() -> None:
    for name, module in PVT(128, CONFIG).named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == (1e-6 if name == "norm" else 1e-5), name
    assert isinstance(PVT(128, CONFIG, final_norm=False).norm, torch.nn.Identity)


def test_weights_start_as_in_the_official_code() -> None:
    torch.manual_seed(0)
    encoder: Any = PVT(256, PVTConfig())
    stage = encoder.stages[2]
    for layer, deviation in (
        (stage.merge.proj, (2 / (4 * 320)) ** 0.5),
        (stage.blocks[0].attn.sr, (2 / 320) ** 0.5),
        (stage.blocks[0].attn.kv, (2 / (320 + 640)) ** 0.5),
        (encoder.patch_embed.proj, (2 / (48 + 64)) ** 0.5),
    ):
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.05)
        assert layer.bias.eq(0).all()
    assert encoder.vis_mask_token.std().item() == pytest.approx(0.02, rel=0.4)
    assert encoder.pos_embed.equal(sincos_table(64, (64, 64)))


def test_a_random_plan_cannot_be_compacted() -> None:
    encoder, images, _ = job()
    sampler = PlanSampler((8, 8), MaskConfig())
    with pytest.raises(ValueError, match="uniform plan"):
        encoder(images, sampler.stack([sampler(seed) for seed in (1, 2)]))
