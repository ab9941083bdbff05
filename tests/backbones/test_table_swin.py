"""Microsoft's Swin: equal to timm's, what masks do, its initialisation, and what recomputation does."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ummim.backbones.table_swin import TableSwin, TableSwinConfig, relative_index
from ummim.masking import MaskConfig, MaskPlan, PlanSampler

SMALL = TableSwinConfig(8, (2, 2, 3, 2), (1, 2, 2, 4), window_size=4)


def job(image_size: int = 128, config: TableSwinConfig = SMALL) -> tuple[TableSwin, Tensor, MaskPlan]:
    torch.manual_seed(0)
    model = TableSwin(image_size, config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sampler = PlanSampler(model.grid, MaskConfig(ratio=0.6))
    images = torch.randn(2, 3, image_size, image_size)
    return model, images, sampler.stack([sampler(seed) for seed in (1, 2)])


@pytest.mark.parametrize("window", [1, 2, 3, 7, 12])
def test_the_index_is_swins(window: int) -> None:
    assert relative_index(window, torch.device("cpu")).equal(get_relative_position_index(window, window))


@pytest.mark.parametrize(("image_size", "window"), [(224, 7), (192, 6), (96, 3), (128, 4), (64, 8), (128, 32)])
def test_a_whole_image_gives_timms_features(image_size: int, window: int) -> None:
    model, images, _ = job(image_size, replace(SMALL, window_size=window))
    sizes: dict[str, Any] = {"embed_dim": 8, "depths": (2, 2, 3, 2), "num_heads": (1, 2, 2, 4)}
    twin = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=0, img_size=image_size, window_size=window, **sizes
    )
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "mask_token"}
    twin.load_state_dict(tensors, strict=True)
    expected = twin.double().eval().forward_features(images.double())  # type: ignore[operator]
    torch.testing.assert_close(model.double()(images.double()), expected, rtol=1e-10, atol=1e-10)


def test_published_sizes() -> None:
    with torch.device("meta"):
        model = TableSwin(192, TableSwinConfig(window_size=6))
    assert sum(parameter.numel() for parameter in model.parameters()) == 89_874_104 - 3072 * 1024 - 3072
    assert [layer.window for layer in model.layers] == [6, 6, 6, 6]
    assert [TableSwinConfig(window_size=14).window(224, stage) for stage in range(4)] == [14, 14, 14, 7]
    assert model(torch.empty(1, 3, 192, 192, device="meta")).shape == (1, 6, 6, 1024)


def test_masked_units_are_the_mask_token_from_the_start() -> None:
    model, images, plan = job()
    x = model.embed(images, plan)  # (2, 32, 32, 8)
    hidden = plan.mask().view(2, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert x[hidden].equal(model.mask_token[0].expand(int(hidden.sum()), -1))  # after the norm, not through it
    dense = model.embed(images, None)
    torch.testing.assert_close(x[~hidden], dense[~hidden])


def test_nothing_masked_is_a_whole_image() -> None:
    model, images, _ = job()
    torch.testing.assert_close(model(images, MaskPlan.from_mask(torch.zeros(2, 16, dtype=torch.bool))), model(images))


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = TableSwin(128, replace(SMALL, embed_dim=64))
    assert 0.001 < model.mask_token.abs().max().item() <= 2
    bound = 48**-0.5  # PyTorch's, of a convolution with 48 inputs
    conv = model.patch_embed.proj
    assert 0.95 * bound < conv.weight.abs().max().item() <= bound
    assert 0.5 * bound < conv.bias.abs().max().item() <= bound
    for block in model.layers[2].blocks:  # type: ignore[union-attr]
        for tensor in (block.attn.relative_position_bias_table, block.attn.qkv.weight, block.mlp.fc2.weight):
            assert tensor.std().item() == pytest.approx(0.02, rel=0.15)
        assert block.attn.qkv.bias.eq(0).all()
        assert block.norm1.eps == 1e-5
    merge: Any = model.layers[1].downsample
    assert merge.reduction.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert merge.reduction.bias is None
    assert (merge.norm.eps, model.norm.eps, model.patch_embed.norm.eps) == (1e-5, 1e-5, 1e-5)


def test_drop_path_grows_linearly_over_all_stages() -> None:
    model: Any = TableSwin(128, replace(SMALL, drop_path=0.4))
    blocks = [block for layer in model.layers for block in layer.blocks]
    rates = [block.drop_path1.drop_prob if isinstance(block.drop_path1, DropPath) else 0.0 for block in blocks]
    assert rates == pytest.approx([i * 0.05 for i in range(9)])


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_changes_no_gradient(reentrant: bool) -> None:
    model, images, plan = job()
    gradients = []
    for recompute in (False, True):
        for layer in model.layers if recompute else ():
            for block in layer.blocks:  # type: ignore[union-attr]
                forward = block.forward
                block.forward = lambda *inputs, f=forward: checkpoint(f, *inputs, use_reentrant=reentrant)
        model.zero_grad()
        model(images, plan).square().mean().backward()
        gradients.append({name: each.grad for name, each in model.named_parameters()})
    for name, grad in gradients[0].items():
        again = gradients[1][name]
        assert grad is not None and again is not None, name
        assert grad.equal(again), name


def test_sixteen_bit_weights_and_autocast() -> None:
    model, images, plan = job()
    expected = model(images, plan)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images, plan).float(), expected, rtol=0.1, atol=0.4)
    half = model.bfloat16()(images, plan)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.4)
