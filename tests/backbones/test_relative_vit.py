"""SimMIM's ViT: the shared bias, where tokens stand, its initialisation, and what precision and recomputation do."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from timm.models.beit import gen_relative_position_index
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ummim.backbones.relative_vit import RelativePositionBias, RelativeViT, RelativeViTConfig, relative_index
from ummim.masking import MaskConfig, MaskPlan, PlanSampler

SMALL = RelativeViTConfig(patch_size=4, embed_dim=24, depth=3, num_heads=3, drop_path=0.0)


def job(throw: float = 0.0, config: RelativeViTConfig = SMALL) -> tuple[RelativeViT, Tensor, MaskPlan]:
    torch.manual_seed(0)
    model = RelativeViT(24, config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sampler = PlanSampler(model.grid, MaskConfig(ratio=0.6), throw)
    return model, torch.randn(2, 3, 24, 24), sampler.stack([sampler(seed) for seed in (1, 2)])


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 5), (14, 14)])
def test_the_index_is_beits(grid: tuple[int, int]) -> None:
    ids = torch.arange(grid[0] * grid[1])[None]
    assert relative_index(ids, grid)[0].equal(gen_relative_position_index(grid))


def test_the_table_of_the_published_size_has_732_rows() -> None:
    index = relative_index(torch.arange(196)[None], (14, 14))[0]
    assert (index[0, 5].item(), index[5, 0].item(), index[0, 0].item()) == (729, 730, 731)
    assert index[1, 196].item() == 0  # the first patch asks the last: 13 rows and columns before it
    assert index[196, 1].item() == 728
    with torch.device("meta"):
        model = RelativeViT(224, RelativeViTConfig())
    assert model.rel_pos_bias is not None
    assert model.rel_pos_bias.relative_position_bias_table.shape == (732, 12)
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_256_720 - 768 * 768 - 768


def test_each_sample_has_the_bias_of_its_own_places() -> None:
    ids = torch.tensor([[0, 5, 35], [7, 8, 1]])
    index = relative_index(ids, (6, 6))
    whole = relative_index(torch.arange(36)[None], (6, 6))[0]
    for b in range(2):
        at = torch.cat([torch.zeros(1, dtype=torch.long), ids[b] + 1])
        assert index[b].equal(whole[at][:, at])


def test_all_blocks_share_one_bias() -> None:
    model, images, plan = job()
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[1]))
    model(images, plan)
    assert len(seen) == 3
    assert all(each is seen[0] for each in seen)
    assert seen[0].shape == (1, 3, 37, 37)  # and all samples, where nothing is thrown


def test_dense_order_and_ragged_order_give_the_same_tokens() -> None:
    """Sequences are laid out differently with and without thrown tokens; attention does not care."""
    model, images, plan = job()
    ids = torch.cat([plan.visible, plan.kept], dim=1)
    seen: list[Tensor] = []
    hook = model.blocks[0].register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0][:, 1:]))
    expected = model(images, plan)  # (B, V + K, D)
    hook.remove()
    x = torch.cat([model.cls_token.expand(2, -1, -1), seen[0].gather(1, ids[:, :, None].expand(-1, -1, 24))], dim=1)
    assert model.rel_pos_bias is not None
    bias = model.rel_pos_bias(ids, x.dtype)
    for block in model.blocks:
        x = block(x, bias)
    torch.testing.assert_close(x[:, 1:], expected, rtol=1e-5, atol=1e-5)


def test_the_bias_is_laid_out_so_that_no_block_copies_it() -> None:
    """PyTorch's memory-efficient attention pads a copy of a bias whose rows are not 8 elements apart."""
    model, _, plan = job()
    ids = torch.cat([plan.visible, plan.kept], dim=1)
    assert model.rel_pos_bias is not None
    torch.nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
    bias = model.rel_pos_bias(ids, torch.bfloat16)
    index = relative_index(ids, model.grid)
    assert index.shape[2] % 8
    assert bias.stride(3) == 1 and all(stride % 8 == 0 for stride in bias.stride()[:3])
    expected = model.rel_pos_bias.relative_position_bias_table[index].permute(0, 3, 1, 2)
    assert bias.equal(expected.bfloat16())


def test_a_whole_image_gives_normed_tokens_and_a_class_token() -> None:
    model, images, _ = job()
    features = model(images)
    assert features.shape == (2, 37, 24)
    nothing = torch.zeros(2, 36, dtype=torch.bool)
    raw = model(images, MaskPlan.from_mask(nothing))
    torch.testing.assert_close(model.norm(raw), features[:, 1:])


def test_initialisation_is_cut_at_one_deviation_and_smaller_in_deep_branches() -> None:
    torch.manual_seed(0)
    model: Any = RelativeViT(24, replace(SMALL, embed_dim=96))
    for tensor in (model.cls_token, model.mask_token, model.patch_embed.proj.weight):
        assert 0.005 < tensor.abs().max().item() <= 0.02
    assert model.patch_embed.proj.bias.eq(0).all()
    assert model.rel_pos_bias.relative_position_bias_table.eq(0).all()
    for i, block in enumerate(model.blocks, start=1):
        assert block.gamma_1.eq(0.1).all() and block.gamma_2.eq(0.1).all()
        for layer, bound in (
            (block.attn.qkv, 0.02),
            (block.mlp.fc1, 0.02),
            (block.attn.proj, 0.02 / (2 * i) ** 0.5),
            (block.mlp.fc2, 0.02 / (2 * i) ** 0.5),
        ):
            assert 0.95 * bound < layer.weight.abs().max().item() <= bound * (1 + 1e-6)
            assert layer.bias is None or layer.bias.eq(0).all()
        assert block.attn.q_bias.eq(0).all() and block.attn.v_bias.eq(0).all()


def test_drop_path_grows_linearly_and_rests_in_evaluation() -> None:
    model: Any = RelativeViT(24, replace(SMALL, drop_path=0.2))
    rates = [block.drop_path1.drop_prob if isinstance(block.drop_path1, DropPath) else 0 for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    images = torch.randn(2, 3, 24, 24)
    torch.manual_seed(0)
    assert not all(one.equal(other) for one, other in pairwise([model(images) for _ in range(6)]))
    model.eval()
    assert model(images).equal(model(images))


@pytest.mark.parametrize("throw", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_changes_no_gradient(throw: float, reentrant: bool) -> None:
    model, images, plan = job(throw)
    gradients = []
    for recompute in (False, True):
        if recompute:
            for block in model.blocks:
                forward = block.forward
                block.forward = lambda x, bias, f=forward: checkpoint(f, x, bias, use_reentrant=reentrant)
        model.zero_grad()
        model(images, plan).square().mean().backward()
        used = {name: each.grad for name, each in model.named_parameters() if not name.startswith("norm.")}
        assert all(grad is not None for grad in used.values())
        gradients.append(used)
    for name, grad in gradients[0].items():
        again = gradients[1][name]
        assert grad is not None and again is not None, name
        assert grad.equal(again), name


def test_the_tables_gradient_does_not_stagnate_in_sixteen_bits() -> None:
    """Each entry's gradient is a sum over all pairs of tokens of all samples, which differ once tokens are thrown."""
    grid, ids = (14, 14), torch.stack([torch.randperm(196)[:98].sort().values for _ in range(64)])
    gradients = {}
    for dtype in (torch.float64, torch.bfloat16):
        bias = RelativePositionBias(grid, 2).to(dtype)
        bias(ids, dtype).sum().backward()
        (gradient,) = (parameter.grad for parameter in bias.parameters())
        assert gradient is not None
        gradients[dtype] = gradient.double()
    torch.testing.assert_close(gradients[torch.bfloat16], gradients[torch.float64], rtol=0.01, atol=0)


def test_sixteen_bit_weights_and_autocast() -> None:
    model, images, plan = job(0.4)
    expected = model(images, plan)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images, plan).float(), expected, rtol=0.1, atol=0.3)
    half = model.bfloat16()(images, plan)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.3)
