"""The decoder sees embedded visible tokens and kept mask tokens, each at its place."""

from typing import Any

import torch

from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.nn.decoder import Decoder, DecoderConfig, PixelHead

CONFIG = DecoderConfig(embed_dim=16, depth=2, num_heads=4)


def plan_of(throw_ratio: float = 0.0) -> MaskPlan:
    sampler = PlanSampler((4, 4), MaskConfig(), throw_ratio)
    return sampler.stack([sampler(seed) for seed in (1, 2)])


def test_the_sequence_equals_the_raster_order_of_mae() -> None:
    torch.manual_seed(0)
    plan = plan_of()
    decoder: Any = Decoder((4, 4), CONFIG, cls_token=True).double()
    latent = torch.randn(2, 1 + 4, 16, dtype=torch.float64)
    visible, kept = decoder(latent, plan)
    for b in range(2):
        tokens = decoder.mask_token[0].expand(16, -1).clone()  # every token of the grid, in raster order
        tokens[plan.visible[b]] = latent[b, 1:]
        x = torch.cat([latent[b, :1], tokens])[None] + decoder.pos_embed
        for block in decoder.blocks:
            x = block(x)
        torch.testing.assert_close(visible[b], x[0, 1:][plan.visible[b]])
        torch.testing.assert_close(kept[b], x[0, 1:][plan.kept[b]])


def test_thrown_tokens_do_not_enter() -> None:
    decoder, plan = Decoder((4, 4), CONFIG, cls_token=False), plan_of(0.5)
    lengths: list[int] = []
    decoder.blocks[0].register_forward_hook(lambda _module, inputs, _output: lengths.append(inputs[0].shape[1]))
    visible, kept = decoder(torch.randn(2, 4, 16), plan)
    assert lengths == [4 + 4]  # 8 of the 12 masked tokens are thrown
    assert visible.shape == kept.shape == (2, 4, 16)


def test_visible_tokens_can_be_told_other_positions() -> None:
    decoder, plan = Decoder((4, 4), CONFIG, cls_token=False), plan_of()
    latent = torch.randn(2, 4, 16)
    swapped = plan.visible.flip(1)
    as_told = decoder(latent, plan, visible_at=swapped)
    shift = decoder.position(swapped) - decoder.position(plan.visible)
    torch.testing.assert_close(as_told, decoder(latent + shift, plan))


def test_the_position_table_is_saved_but_not_trained() -> None:
    decoder = Decoder((4, 4), CONFIG, cls_token=True)
    assert "pos_embed" in decoder.state_dict()
    assert "pos_embed" not in dict(decoder.named_parameters())


def test_the_head_norms_and_predicts_a_patch() -> None:
    head = PixelHead(16, 4)
    tokens = torch.randn(2, 5, 16) * 9
    assert head(tokens).shape == (2, 5, 48)
    torch.testing.assert_close(head(tokens * 3 + 1), head(tokens), atol=1e-4, rtol=1e-4)  # the norm's invariance
    assert head.norm.eps == 1e-6
