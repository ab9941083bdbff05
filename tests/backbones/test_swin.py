"""The compact Swin encoder; its numbers are checked against a plain one in tests/methods."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.methods.plain_methods import embed_map, swin_stages
from ummim.backbones.pyramid import PatchMerge
from ummim.backbones.swin import Swin, SwinConfig
from ummim.masking import MaskConfig, MaskPlan, PlanSampler

CONFIG = SwinConfig(8, (1, 2, 1, 1), (1, 2, 2, 4), pos_mlp_dim=6)


def job(secondary: float = 0.25) -> tuple[Swin, torch.Tensor, MaskPlan]:
    torch.manual_seed(0)
    encoder = Swin(128, CONFIG).double()
    sampler = PlanSampler(encoder.grid, MaskConfig("uniform", 0.75, secondary))
    plan = sampler.stack([sampler(seed) for seed in (1, 2)])
    return encoder, torch.randn(2, 3, 128, 128, dtype=torch.float64), plan


def test_a_plan_halves_the_map_and_none_keeps_it() -> None:
    encoder, images, plan = job()
    assert encoder(images, plan).shape == (2, 2, 2, 64)
    assert encoder(images).shape == (2, 4, 4, 64)


def test_secondary_patches_become_one_token_and_keep_their_place() -> None:
    encoder, images, plan = job()
    x, rows, cols = encoder.embed(images, plan)
    token = encoder.patch_embed.norm(encoder.vis_mask_token)[0, 0]
    for b in range(2):
        for block in range(16):
            top, left = 4 * (block // 4), 4 * (block % 4)
            tile = x[b, top : top + 4, left : left + 4]
            assert tile.eq(token).all() == plan.secondary[b, block]
            patch = plan.visible[b, block]
            assert rows[b, top, left] == 4 * (patch // 8)
            assert cols[b, top, left] == 4 * (patch % 8)


def test_secondary_tokens_of_a_batch_train_the_shared_token() -> None:
    encoder, images, plan = job()
    encoder(images, plan).square().sum().backward()
    assert encoder.vis_mask_token is not None
    assert encoder.vis_mask_token.grad is not None
    assert encoder.vis_mask_token.grad.abs().gt(0).any()


def test_samples_of_a_batch_do_not_meet() -> None:
    encoder, images, plan = job()
    fields = (plan.visible[1:], plan.secondary[1:], plan.kept[1:], plan.thrown[1:])
    alone = MaskPlan(plan.grid, *fields, compact=True)
    torch.testing.assert_close(encoder(images, plan)[1:], encoder(images[1:], alone))


def test_masked_patches_are_not_read() -> None:
    encoder, images, plan = job(secondary=0.0)
    hidden = plan.mask().view(2, 1, 8, 8).repeat_interleave(16, 2).repeat_interleave(16, 3)
    assert encoder(images.masked_fill(hidden, float("nan")), plan).isfinite().all()


def test_a_merge_is_a_norm_and_a_strided_convolution() -> None:
    merge = PatchMerge(4, 8, norm=True)
    x = torch.randn(2, 6, 4, 4)
    normed = F.layer_norm(x, (4,), eps=1e-6).permute(0, 3, 1, 2)
    expected = F.conv2d(normed, merge.proj.weight, merge.proj.bias, stride=2).permute(0, 2, 3, 1)
    torch.testing.assert_close(merge(x), expected)
    assert merge(x).shape == (2, 3, 2, 8)


def test_norms_have_the_official_epsilons() -> None:
    encoder = Swin(128, CONFIG)
    for name, module in encoder.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == (1e-5 if ".norm1" in name or ".norm2" in name else 1e-6), name


def test_convolutions_start_as_in_the_official_code() -> None:
    torch.manual_seed(0)
    encoder: Any = Swin(256, SwinConfig())
    merge, mlp = encoder.stages[1].merge, encoder.stages[3].blocks[0].attn.posmlp
    expected = [(merge.proj, (2 / (4 * 192)) ** 0.5), (mlp[0], (2 / 32) ** 0.5), (mlp[2], (2 / 24) ** 0.5)]
    for layer, deviation in expected:
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.25)
        assert layer.bias.eq(0).all()
    assert encoder.patch_embed.proj.bias.eq(0).all()


def test_a_random_plan_is_refused() -> None:
    encoder, images, _ = job()
    sampler = PlanSampler((8, 8), MaskConfig())
    with pytest.raises(ValueError, match="uniform plan"):
        encoder(images, sampler.stack([sampler(seed) for seed in (1, 2)]))


def test_masked_patches_become_the_mask_token_on_the_whole_map() -> None:
    """SimMIM as UM-MAE's code has it: the raw token, after the patch embedding and its norm."""
    torch.manual_seed(0)
    encoder = Swin(128, CONFIG, "replace").double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sampler = PlanSampler(encoder.grid, MaskConfig("random", 0.6))
    plan = sampler.stack([sampler(seed) for seed in (1, 2)])
    images = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    expected = []
    for image, masked in zip(images, plan.mask().view(2, 8, 8), strict=True):
        x, coordinates = embed_map(encoder, image)
        hidden = masked.repeat_interleave(4, 0).repeat_interleave(4, 1)
        assert encoder.mask_token is not None
        expected.append(swin_stages(encoder, torch.where(hidden[..., None], encoder.mask_token[0, 0], x), coordinates))
    found = encoder(images, plan)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-9)
    losses = [found.square().sum(), torch.stack(expected).square().sum()]
    fast, plain = (torch.autograd.grad(loss, list(encoder.parameters())) for loss in losses)
    torch.testing.assert_close(fast, plain, rtol=1e-7, atol=1e-8)
    hidden = plan.mask().view(2, 1, 8, 8).repeat_interleave(16, 2).repeat_interleave(16, 3)
    assert encoder(images.masked_fill(hidden, float("nan")), plan).equal(found)


def test_windows_that_are_the_whole_map_have_their_geometry_computed_once() -> None:
    encoder, images, plan = job()
    shifts: list[list[int]] = []
    same: list[bool] = []
    for stage in encoder.stages:
        stage.register_forward_hook(lambda _module, inputs, _output: shifts.append([g.shift for g in inputs[1:]]))
        stage.register_forward_hook(lambda _module, inputs, _output: same.append(inputs[1] is inputs[2]))
    encoder(images, plan)  # maps of 16, 8, 4 and 2 tokens a side, windows of 8
    assert shifts == [[0, 4], [0, 0], [0, 0], [0, 0]]
    assert same == [False, True, True, True]
