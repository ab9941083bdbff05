"""GreenMIM's fast path against GreenMIM written plainly, on whole maps with boolean masks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.methods.plain_green_mim import plain_green_mim
from ummim.backbones.table_swin import TableSwinConfig
from ummim.errors import RecipeError
from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.methods.green_mim import Config, GreenMIM
from ummim.nn.decoder import DecoderConfig

SMALL = Config(
    TableSwinConfig(embed_dim=8, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4), window_size=4, mlp_ratio=2.0),
    DecoderConfig(embed_dim=16, depth=1, num_heads=4),
)
THREE_HEADS = replace(SMALL.encoder, num_heads=(1, 2, 3, 4))
SHARED = MaskConfig(shared_by=2)


def job(config: Config, image_size: int, throw: float = 0.0, seed: int = 0) -> tuple[GreenMIM, Tensor, MaskPlan]:
    torch.manual_seed(0)
    model = GreenMIM(image_size, config, throwing=throw > 0).double()
    for parameter in model.parameters():  # no zero biases: they would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    sampler = PlanSampler(model.grid, SHARED, throw)
    plan = sampler.stack([sampler(seed) for _ in range(2)])
    return model, torch.randn(2, 3, image_size, image_size, dtype=torch.float64), plan


def plain(model: GreenMIM, images: Tensor, plan: MaskPlan) -> tuple[Tensor, Tensor]:
    masked = plan.mask()
    return plain_green_mim(model, images, masked, torch.zeros_like(masked).scatter(1, plan.thrown, True))


@pytest.mark.parametrize(
    ("image_size", "window", "throw", "norm_pix"),
    [
        (128, 4, 0.0, True),
        (128, 8, 0.5, True),
        (192, 3, 0.25, False),
        (192, 6, 0.5, True),
        (224, 7, 0.5, True),
        (224, 14, 0.0, True),
    ],
)
def test_equals_the_plain_implementation(image_size: int, window: int, throw: float, norm_pix: bool) -> None:
    config = replace(SMALL, encoder=replace(SMALL.encoder, window_size=window), norm_pix_loss=norm_pix)
    for seed in range(2):
        model, images, plan = job(config, image_size, throw, seed)
        loss, prediction = plain(model, images, plan)
        output = model(images, plan)
        torch.testing.assert_close(output.loss, loss, rtol=1e-10, atol=0)
        masked = plan.mask()
        torch.testing.assert_close(output.prediction[masked], prediction[masked], rtol=1e-8, atol=1e-8)
        assert output.prediction[~masked].eq(0).all()


@pytest.mark.parametrize("throw", [0.0, 0.5])
def test_gradients_equal_the_plain_implementations(throw: float) -> None:
    model, images, plan = job(SMALL, 128, throw)
    losses = (model(images, plan).loss, plain(model, images, plan)[0])
    fast, slow = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    torch.testing.assert_close(fast, slow, rtol=1e-7, atol=1e-9)


def test_the_merge_order_of_the_first_release_permutes_the_weights() -> None:
    """TL, TR, BL, BR with weights exchanged in their second and third quarters is TL, BL, TR, BR."""
    model, images, plan = job(SMALL, 128)
    first, _, _ = job(replace(SMALL, row_major_merge=True), 128)
    assert first(images, plan).loss != model(images, plan).loss
    tensors = model.state_dict()
    for key, tensor in tensors.items():
        if ".downsample." in key:
            quarters = tensor.chunk(4, dim=-1)
            tensors[key] = torch.cat([quarters[i] for i in (0, 2, 1, 3)], dim=-1)
    first.load_state_dict(tensors)
    torch.testing.assert_close(first(images, plan).loss, model(images, plan).loss, rtol=1e-12, atol=0)


def test_a_batch_of_several_masks_is_refused() -> None:
    model, images, _ = job(SMALL, 128)
    sampler = PlanSampler(model.grid, MaskConfig())
    with pytest.raises(ValueError, match="all samples must share one mask"):
        model(images, sampler.stack([sampler(seed) for seed in range(2)]))


@pytest.mark.parametrize(
    ("config", "image_size", "mask", "key"),
    [
        (SMALL, 128, MaskConfig(), "mask.shared_by"),
        (SMALL, 120, SHARED, "data.image_size"),
        (SMALL, 224, SHARED, "method.encoder.window_size"),
        (replace(SMALL, encoder=THREE_HEADS), 128, SHARED, "method.encoder.num_heads"),
        (replace(SMALL, decoder=DecoderConfig(18, 1, 2)), 128, SHARED, "method.decoder.embed_dim"),
        (SMALL, 128, replace(SHARED, secondary_ratio=0.25), "mask.secondary_ratio"),
    ],
)
def test_recipes_that_cannot_run_are_refused(config: Config, image_size: int, mask: MaskConfig, key: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        config.check(image_size, mask, 0.0)
    assert refusal.value.key == key


def test_a_recipe_that_can_run_passes() -> None:
    Config().check(224, MaskConfig(shared_by=64), 0.5)
    assert Config().mask_grid(224) == (7, 7)
    assert not Config().static_shapes


@pytest.mark.parametrize(
    ("embed_dim", "heads", "window", "count"), [(128, 4, 7, 92_022_968), (192, 6, 14, 200_799_444)]
)
def test_sizes_are_the_official_ones(embed_dim: int, heads: int, window: int, count: int) -> None:
    """With the decoder's fixed position table (25,088), without index tables, as officially counted."""
    swin = TableSwinConfig(embed_dim, (2, 2, 18, 2), (heads, 2 * heads, 4 * heads, 8 * heads), window)
    with torch.device("meta"):
        model = GreenMIM(224, Config(swin))
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == count
    assert sum(parameter.numel() for parameter in model.parameters()) == count - 49 * 512


def test_blocks_are_the_encoders_then_the_decoders() -> None:
    model, _, _ = job(SMALL, 128)
    assert len(model.blocks()) == 8 + 1
    assert model.blocks()[-1] is model.decoder.blocks[-1]
