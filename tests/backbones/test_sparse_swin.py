"""The sparse Swin encoder: against a plain one on whole maps with boolean masks, and against timm's Swin."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tests.methods.plain_green_mim import plain_stages
from tests.methods.plain_methods import norm_of
from ummim.backbones.sparse_swin import SparseSwin
from ummim.backbones.table_swin import TableSwinConfig
from ummim.masking import MaskPlan

CONFIG = TableSwinConfig(embed_dim=8, depths=(2, 2, 3, 2), num_heads=(1, 2, 2, 4), window_size=4, mlp_ratio=2.0)


def job(image_size: int = 128, window: int = 4, seed: int = 0, visible: int = 4, **options: Any) -> tuple[Any, ...]:
    """A tiny encoder in float64, images, and a plan that they share."""
    torch.manual_seed(seed)
    encoder = SparseSwin(image_size, replace(CONFIG, window_size=window), **options).double()
    for parameter in encoder.parameters():  # no zero biases: they would hide mistakes
        nn.init.normal_(parameter, std=0.3)
    units = encoder.grid[0] * encoder.grid[1]
    masked = torch.ones(units, dtype=torch.bool)
    masked[torch.randperm(units)[:visible]] = False
    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    return encoder, images, MaskPlan.from_mask(masked.expand(2, -1))


CASES = [
    (128, 4, 4),  # grids 32, 16, 8, 4: grouped and shifted in two stages, one group in the third, one window at last
    (128, 2, 5),
    (128, 8, 4),  # windows are the units of the first stage; shifted ones straddle four
    (192, 6, 9),  # windows cut through units
    (192, 3, 9),  # an odd window, shifted by one
    (224, 7, 12),
    (224, 14, 12),  # the third stage's grid is one window
    (96, 6, 1),  # a single unit
]


@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize(("image_size", "window", "visible"), CASES)
def test_every_stage_equals_the_plain_encoders(image_size: int, window: int, visible: int, row_major: bool) -> None:
    encoder, images, plan = job(image_size, window, visible=visible, row_major_merge=row_major)
    check_against_plain(encoder, images, plan, row_major)


@pytest.mark.parametrize(("image_size", "window", "visible"), [(128, 4, 4), (224, 7, 12), (224, 14, 12)])
def test_legacy_coordinates_equal_the_plain_encoders(image_size: int, window: int, visible: int) -> None:
    encoder, images, plan = job(image_size, window, visible=visible, legacy_coordinates=True, row_major_merge=True)
    check_against_plain(encoder, images, plan, True)
    legacy = encoder.features(images, plan)
    encoder.legacy_coordinates = False
    mended = encoder.features(images, plan)
    assert legacy[0].x.equal(mended[0].x)  # the first stage is right either way
    assert not legacy[1].x.equal(mended[1].x)
    assert all(one.ids.equal(other.ids) for one, other in zip(legacy, mended, strict=True))  # the true cells


def check_against_plain(encoder: SparseSwin, images: Tensor, plan: MaskPlan, row_major: bool) -> None:
    taps = encoder.features(images, plan)
    maps = [plain_stages(encoder, image, hidden, row_major) for image, hidden in zip(images, plan.mask(), strict=True)]
    for tap, side, width, *each in zip(taps, (4, 2, 1, 1), (2, 4, 8, 8), *maps, strict=True):
        expected = torch.stack(each).flatten(1, 2)  # (B, h' * w', C)
        assert tap.grid == (encoder.grid[0] * side, encoder.grid[1] * side)
        assert tap.x.shape == (2, plan.visible.shape[1] * side**2, 8 * width)
        assert [len(set(ids)) for ids in tap.ids.tolist()] == 2 * [tap.x.shape[1]]
        expected = expected.gather(1, tap.ids[:, :, None].expand_as(tap.x))
        torch.testing.assert_close(tap.x, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(encoder(images, plan), norm_of(taps[-1].x, encoder.norm))
    assert taps[-1].ids.equal(plan.visible)


def test_gradients_equal_the_plain_encoders() -> None:
    encoder, images, plan = job(192, 6, visible=9)
    toward = torch.randn(2, 9, 64, dtype=torch.float64)
    maps = [plain_stages(encoder, image, hidden)[-1] for image, hidden in zip(images, plan.mask(), strict=True)]
    slow = norm_of(torch.stack(maps).flatten(1, 2), encoder.norm).gather(1, plan.visible[:, :, None].expand(-1, -1, 64))
    parameters = list(encoder.parameters())
    grads = (torch.autograd.grad((y * toward).sum(), parameters) for y in (encoder(images, plan), slow))
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("image_size", "window"), [(128, 4), (224, 7), (224, 14), (64, 8)])
def test_a_dense_image_equals_timms_swin(image_size: int, window: int) -> None:
    """Same names, same numbers: a trained encoder loads into timm as it is."""
    encoder, images, _ = job(image_size, window)
    twin = SwinTransformer(
        img_size=image_size, window_size=window, embed_dim=8, depths=CONFIG.depths, num_heads=CONFIG.num_heads,
        mlp_ratio=2.0, num_classes=0, norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
    ).double().eval()  # fmt: skip
    twin.load_state_dict(encoder.state_dict(), strict=True)
    torch.testing.assert_close(encoder(images), twin.forward_features(images).flatten(1, 2), rtol=1e-9, atol=1e-9)


def test_all_units_visible_is_a_dense_image() -> None:
    encoder, images, _ = job()
    everything = MaskPlan.from_mask(torch.zeros(2, 16, dtype=torch.bool))
    assert encoder(images, everything).equal(encoder(images))


def test_tokens_follow_the_order_of_the_plan() -> None:
    encoder, images, plan = job()
    flipped = replace(plan, visible=plan.visible.flip(1), shared=plan.shared[::-1])
    torch.testing.assert_close(encoder(images, flipped), encoder(images, plan).flip(1))


def test_samples_of_a_batch_do_not_meet() -> None:
    encoder, images, plan = job()
    alone = MaskPlan.from_mask(plan.mask()[1:])
    torch.testing.assert_close(encoder(images, plan)[1:], encoder(images[1:], alone))


def test_masked_units_are_neither_read_nor_embedded() -> None:
    encoder, images, plan = job()
    hidden = plan.mask().view(2, 1, 4, 4).repeat_interleave(32, 2).repeat_interleave(32, 3)
    tokens: list[int] = []
    encoder.patch_embed.proj.register_forward_hook(lambda _module, _inputs, out: tokens.append(out[..., 0].numel()))
    assert encoder(images.masked_fill(hidden, float("nan")), plan).equal(encoder(images, plan))
    assert tokens == 2 * [2 * 4 * 64]


def test_a_plan_of_several_masks_is_refused() -> None:
    encoder, images, plan = job()
    with pytest.raises(ValueError, match="all samples must share one mask"):
        encoder(images, MaskPlan.from_mask(torch.stack([plan.mask()[0], plan.mask()[0].roll(1)])))


def test_the_forward_looks_at_no_value_on_the_device() -> None:
    """Fake tensors have shapes only; the mask comes from the host."""
    encoder, images, plan = job()
    images = images.float()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = SparseSwin(128, CONFIG)
        y = fake(mode.from_tensor(images), plan._map(mode.from_tensor))
        y.sum().backward()
    assert y.shape == encoder(images.double(), plan).shape


def test_shapes_alone_run_through_the_fused_kernels_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, as ``ummim cost`` counts; fused kernels lay their output out as (B, N, heads, d)."""
    encoder, images, plan = job()
    fused = F.scaled_dot_product_attention

    def laid_out(*args: Any, **kwargs: Any) -> Tensor:
        return fused(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", laid_out)
    y = encoder.to("meta")(images.to("meta"), plan.to("meta"))
    y.sum().backward()
    assert y.shape == (2, 4, 64)


def test_reentrant_checkpointing_of_the_blocks_changes_no_bit() -> None:
    encoder, images, plan = job()
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            for block in encoder.blocks():
                forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=True)
                block.forward = forward
        encoder.zero_grad()
        encoder(images, plan).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in encoder.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert plain.equal(again)


def test_a_compiled_block_takes_any_mask(fresh_compiler: None) -> None:
    """The whole forward is compiled anew for every mask, since its shapes follow it; a block is not."""
    encoder, images, _ = job()
    plans = [job(seed=seed)[2] for seed in range(6)]
    eager = [encoder(images, plan) for plan in plans]
    encoder.layers[0].blocks[1].compile(backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(recompile_limit=2):
        for plan, expected in zip(plans, eager, strict=True):
            torch.testing.assert_close(encoder(images, plan), expected)


def test_stochastic_depth_grows_linearly_and_rests_in_eval() -> None:
    encoder, images, plan = job()
    deep = SparseSwin(128, replace(CONFIG, drop_path=0.8)).double()
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in deep.blocks()]
    assert rates == pytest.approx([0.1 * i for i in range(9)])
    deep.load_state_dict(encoder.state_dict())
    assert not deep(images, plan).equal(encoder(images, plan))
    assert deep.eval()(images, plan).equal(encoder(images, plan))


def test_without_a_final_norm_the_last_tokens_are_raw() -> None:
    encoder, images, plan = job(final_norm=False)
    assert not any(key.startswith("norm.") for key in encoder.state_dict())
    assert encoder(images, plan).equal(encoder.features(images, plan)[-1].x)


def test_initialisation_and_epsilons_are_greenmims() -> None:
    torch.manual_seed(0)
    encoder = SparseSwin(224, replace(CONFIG, embed_dim=32, num_heads=(2, 4, 8, 16), window_size=7))
    assert encoder.patch_embed.proj.bias.abs().amax() > 0  # PyTorch's default
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear):
            fan = (6 / (module.in_features + module.out_features)) ** 0.5
            assert module.weight.abs().amax().item() == pytest.approx(fan, rel=0.02), name
            assert module.bias is None or module.bias.eq(0).all()
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias_table"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name


@pytest.mark.parametrize(("embed_dim", "heads", "window", "count"), [(128, 4, 7, 86_743_224), (192, 6, 14, None)])
def test_sizes_are_the_papers(embed_dim: int, heads: int, window: int, count: int | None) -> None:
    config = TableSwinConfig(embed_dim, (2, 2, 18, 2), (heads, 2 * heads, 4 * heads, 8 * heads), window)
    with torch.device("meta"):
        encoder: Any = SparseSwin(224, config)
    tables = [layer.blocks[0].attn.relative_position_bias_table.shape[0] for layer in encoder.layers]
    assert tables == ([169] * 4 if window == 7 else [729, 729, 729, 169])
    if count is not None:
        assert sum(parameter.numel() for parameter in encoder.parameters()) == count
