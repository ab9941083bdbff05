"""LocalMIM on a ViT: its fast path against LocalMIM written plainly, and what a prediction may see."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.methods.plain_local_mim import check_against_the_plain_one, every_scale, job
from ummim.backbones.table_swin import TableSwinConfig
from ummim.backbones.vit import ViTConfig
from ummim.errors import RecipeError
from ummim.masking import MaskConfig, MaskPlan
from ummim.methods.local_mim import Config, LocalDecoderConfig
from ummim.nn.aggregation import PartialConfig
from ummim.nn.layers import finer_cells

SMALL = Config(
    encoder=ViTConfig(patch_size=8, embed_dim=24, depth=5, num_heads=3),
    decoder=LocalDecoderConfig(embed_dims=(16, 24, 8, 12), num_heads=2),
    taps=(0, 1, 3, 4),
)
PIXEL = replace(SMALL, target="pixel")


@pytest.mark.parametrize(
    ("image_size", "mask", "throw", "aggregation"),
    [
        (48, MaskConfig(), 0.0, "conv"),
        (48, MaskConfig(), 0.5, "conv"),
        (48, MaskConfig(), 0.5, "none"),
        (32, MaskConfig("uniform"), 0.0, "conv"),  # every coarse cell is masked to three quarters
        (32, MaskConfig("random", 0.5), 0.3, "conv"),  # whole coarse cells are visible
        (64, MaskConfig("random", 0.75, throwing="random"), 0.65, "conv"),
    ],
)
@pytest.mark.parametrize("config", [SMALL, PIXEL], ids=["hog", "pixel"])
def test_equals_the_plain_implementation(
    config: Config, image_size: int, mask: MaskConfig, throw: float, aggregation: str
) -> None:
    check_against_the_plain_one(*job(config, image_size, mask, throw, aggregation))


def test_an_aggregation_in_each_decoder_changes_nothing_while_nothing_is_thrown() -> None:
    model, images, plan = job(SMALL, 48, MaskConfig(), 0.0)
    partial = SMALL.build(48, PartialConfig(), throwing=True).double()
    missing = partial.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert missing == [f"decoders.{k}.aggregation.layer.{part}" for k in range(4) for part in ("weight", "bias")]
    assert partial(images, plan).loss == model(images, plan).loss


def test_options_of_the_target_equal_the_plain_implementation() -> None:
    check_against_the_plain_one(*job(replace(SMALL, hog_bins=18, hog_bias=True), 32, MaskConfig(), 0.5))
    check_against_the_plain_one(*job(replace(PIXEL, norm_pix_loss=False), 32, MaskConfig(), 0.0))


def test_oblong_grids_are_numbered_row_by_row() -> None:
    """Square images hide a mix-up of rows and columns in the cells' numbers."""
    cells = finer_cells(torch.tensor([[0, 7]]), 5, 2)  # token (1, 2) of 5 columns is at (2, 4) of 10
    assert cells.tolist() == [[0, 1, 10, 11, 24, 25, 34, 35]]


def test_the_tapped_blocks_of_the_official_depths() -> None:
    assert Config().decoded_blocks(12) == (1, 3, 9, 11)
    assert Config().decoded_blocks(24) == (1, 3, 21, 23)


def test_masked_pixels_never_reach_the_encoder() -> None:
    model, images, plan = job(PIXEL, 48, MaskConfig(), 0.5)
    hidden = plan.mask().view(2, 1, 6, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    torn = images.masked_fill(hidden, float("nan"))
    for ours, whole in zip(every_scale(model, torn, plan), every_scale(model, images, plan), strict=True):
        assert ours.values.equal(whole.values)


def test_a_visible_coarse_cell_is_in_no_loss_and_a_half_masked_one_counts_half() -> None:
    model, images, _ = job(PIXEL, 32, MaskConfig(), 0.0, batch=1)
    masked = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 0, 0]]).bool()
    coarse = every_scale(model, images, MaskPlan.from_mask(masked[None]))[3]
    assert coarse.weight.tolist() == [[0.5, 0.0, 1.0, 0.25]]


def test_only_masked_tokens_go_through_the_deconvolutions() -> None:
    model: Any
    model, images, plan = job(SMALL, 48, MaskConfig(), 0.0)
    tokens: list[int] = []
    model.decoders[0].head.pred[0].register_forward_hook(lambda _m, inputs, _o: tokens.append(inputs[0].shape[1]))
    model(images, plan)
    assert tokens == [plan.masked.shape[1]]


def test_what_is_predicted() -> None:
    hog, images, plan = job(SMALL, 48, MaskConfig(), 0.0)
    assert not hog.predicts_pixels
    assert hog(images, plan).predicted.shape == (2, 27, 27)
    pixel, images, plan = job(PIXEL, 48, MaskConfig(), 0.5)
    assert pixel.predicts_pixels
    assert pixel(images, plan).predicted.shape == (2, 27, 192)


def test_initialisation_is_the_papers() -> None:
    """Linear layers as MAE's; the heads' convolutions keep PyTorch's (a 1x1 convolution's bound is a linear's)."""
    torch.manual_seed(0)
    model: Any = Config(ViTConfig(8, 24, 5, 3), taps=(0, 1, 2, 4)).build(32, PartialConfig(), False)
    decoder = model.decoders[0]
    assert decoder.embed.bias.eq(0).all()
    assert decoder.embed.weight.abs().max() <= (6 / (24 + 256)) ** 0.5
    for layer, fan_in in ((decoder.head.pred[0], 128 * 4), (decoder.head.pred[4], 64)):
        assert 0.9 * fan_in**-0.5 < layer.weight.abs().max() <= fan_in**-0.5
        assert 0.5 * fan_in**-0.5 < layer.bias.abs().max() <= fan_in**-0.5
    assert [norm.eps for norm in (*model.norms, decoder.head.norm, decoder.head.pred[1])] == [1e-6] * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_target_and_loss_in_float32(dtype: torch.dtype) -> None:
    model, images, plan = job(SMALL, 48, MaskConfig(), 0.5)
    model, images = model.float(), images.float()
    with torch.autocast("cpu", dtype):
        output = model(images, plan)
    assert output.loss.dtype is torch.float32
    torch.testing.assert_close(output.loss, model(images, plan).loss, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("config", "image_size", "key", "message"),
    [
        (Config(ViTConfig(patch_size=14)), 224, "method.encoder.patch_size", "multiple of 4, not 14"),
        (Config(), 240, "data.image_size", "240 pixels are no multiple of 32"),
        (Config(ViTConfig(depth=5)), 224, "method.taps", "2, 4., the default, are not four ascending .* 5 blocks"),
        (Config(taps=(0, 1, 2, 12)), 224, "method.taps", "12 blocks"),
        (Config(taps=(-1, 1, 2, 3)), 224, "method.taps", "ascending"),
        (Config(decoder=LocalDecoderConfig(num_heads=7)), 224, "method.decoder.num_heads", "7 heads .* 256"),
        (Config(decoder=LocalDecoderConfig((8, 8, 6, 8), num_heads=2)), 224, "method.decoder.embed_dims", "not 6"),
        (Config(hog_bins=0), 224, "method.hog_bins", "at least 1"),
        (Config(row_major_merge=True), 224, "method.row_major_merge", "of the Swin encoder"),
        (Config(TableSwinConfig()), 200, "data.image_size", "multiple of 32"),
        (Config(TableSwinConfig(), taps=(0, 1, 2, 3)), 224, "method.taps", "of the ViT encoder"),
        (Config(TableSwinConfig()), 224, "mask.shared_by", "one mask for a whole micro-batch"),
    ],
)
def test_sizes_that_do_not_fit_name_the_key(config: Config, image_size: int, key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        config.check(image_size, MaskConfig(), 0.5)
    assert error.value.key == key


def test_the_papers_sizes_pass() -> None:
    Config().check(224, MaskConfig(), 0.5)
    Config(ViTConfig(16, 1024, 24, 16), hog_bins=18, hog_bias=True).check(224, MaskConfig(), 0.0)
    swin = Config(TableSwinConfig(), LocalDecoderConfig((64, 128, 128, 128), num_heads=4))
    swin.check(224, MaskConfig(shared_by=64), 0.5)
    assert (Config().mask_grid(224), swin.mask_grid(224)) == ((14, 14), (7, 7))
