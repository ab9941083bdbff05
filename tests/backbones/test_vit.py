"""The ViT encoder on visible tokens."""

import torch

from ummim.backbones.vit import ViT, ViTConfig
from ummim.masking import MaskConfig, MaskPlan, PlanSampler

CONFIG = ViTConfig(patch_size=4, embed_dim=24, depth=2, num_heads=3)


def job(image_size: int = 24) -> tuple[ViT, torch.Tensor, MaskPlan]:
    torch.manual_seed(0)
    encoder = ViT(image_size, CONFIG).double()
    sampler = PlanSampler(encoder.grid, MaskConfig())
    plan = sampler.stack([sampler(seed) for seed in (1, 2)])
    return encoder, torch.randn(2, 3, image_size, image_size, dtype=torch.float64), plan


def test_without_a_plan_every_token_is_seen() -> None:
    encoder, images, _ = job()
    everything = MaskPlan.from_mask(torch.zeros(2, 36, dtype=torch.bool))
    assert encoder(images).shape == (2, 1 + 36, 24)
    assert encoder(images).equal(encoder(images, everything))


def test_tokens_follow_the_order_of_the_plan() -> None:
    encoder, images, plan = job()
    flipped = MaskPlan(plan.grid, plan.visible.flip(1), plan.secondary, plan.kept, plan.thrown)
    tokens, mirrored = encoder(images, plan), encoder(images, flipped)
    torch.testing.assert_close(mirrored[:, 1:], tokens[:, 1:].flip(1))
    torch.testing.assert_close(mirrored[:, 0], tokens[:, 0])


def test_samples_of_a_batch_do_not_meet() -> None:
    encoder, images, plan = job()
    alone = MaskPlan(plan.grid, plan.visible[1:], plan.secondary[1:], plan.kept[1:], plan.thrown[1:])
    torch.testing.assert_close(encoder(images, plan)[1:], encoder(images[1:], alone))


def test_low_precision_weights_take_float_images() -> None:
    encoder, images, plan = job()
    encoder = encoder.to(torch.bfloat16)
    assert encoder(images.float(), plan).dtype == torch.bfloat16


def test_masked_patches_are_not_read() -> None:
    encoder, images, plan = job()
    hidden = plan.mask().view(2, 1, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert encoder(images.masked_fill(hidden, float("nan")), plan).isfinite().all()
    seen = ~hidden
    assert encoder(images.masked_fill(seen, float("nan")), plan).isnan().any()
