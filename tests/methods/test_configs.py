"""Method configs: grids, and sizes that do not fit each other."""

from dataclasses import replace

import pytest
import torch

from ummim.backbones.swin import SwinConfig
from ummim.backbones.vit import ViTConfig
from ummim.errors import RecipeError
from ummim.masking import MaskConfig
from ummim.methods import mae, um_mae
from ummim.methods.api import MethodConfig
from ummim.nn.aggregation import PartialConfig
from ummim.nn.decoder import DecoderConfig

UNIFORM = MaskConfig("uniform", 0.75, 0.25)


def test_mask_grids() -> None:
    assert mae.Config().mask_grid(224) == (14, 14)
    assert mae.Config(encoder=ViTConfig(patch_size=14)).mask_grid(224) == (16, 16)
    assert um_mae.Config().mask_grid(256) == (16, 16)


@pytest.mark.parametrize(
    ("config", "image_size", "mask"),
    [
        (mae.Config(), 224, MaskConfig()),
        (mae.Config(), 224, MaskConfig("uniform")),
        (mae.Config(ViTConfig(14, 1280, 32, 16)), 224, MaskConfig()),
        (um_mae.Config(), 256, UNIFORM),
        (um_mae.Config(SwinConfig(192, (2, 2, 18, 2), (6, 12, 24, 48), pos_mlp_dim=64)), 256, UNIFORM),
        (um_mae.Config(SwinConfig(window_size=16)), 256, UNIFORM),
        (um_mae.Config(SwinConfig(window_size=6)), 192, UNIFORM),
    ],
)
def test_the_papers_sizes_pass(config: MethodConfig, image_size: int, mask: MaskConfig) -> None:
    config.check(image_size, mask, 0.5)


@pytest.mark.parametrize(
    ("config", "image_size", "mask", "key", "message"),
    [
        (mae.Config(), 225, MaskConfig(), "data.image_size", "225 pixels are no multiple of the patch size 16"),
        (mae.Config(ViTConfig(patch_size=0)), 224, MaskConfig(), "method.encoder.patch_size", "at least 1"),
        (mae.Config(ViTConfig(num_heads=7)), 224, MaskConfig(), "method.encoder.num_heads", "7 heads .* 768"),
        (mae.Config(decoder=DecoderConfig(num_heads=0)), 224, MaskConfig(), "method.decoder.num_heads", "0 heads"),
        (mae.Config(), 224, UNIFORM, "mask.secondary_ratio", "mae has no token"),
        (um_mae.Config(), 224, UNIFORM, "data.image_size", "such as (192|256)"),
        (um_mae.Config(), 256, MaskConfig(), "mask.kind", "um_mae cannot train under a random mask; use uniform"),
        (um_mae.Config(SwinConfig(window_size=7)), 256, UNIFORM, "method.encoder.window_size", "window of 7"),
        (um_mae.Config(SwinConfig(window_size=0)), 256, UNIFORM, "method.encoder.window_size", "window of 0"),
        (um_mae.Config(SwinConfig(num_heads=(3, 6, 12, 25))), 256, UNIFORM, "method.encoder.num_heads", "25 heads"),
    ],
)
def test_sizes_that_do_not_fit_name_the_key(
    config: MethodConfig, image_size: int, mask: MaskConfig, key: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        config.check(image_size, mask, 0.0)
    assert error.value.key == key


def test_parameter_counts_are_the_official_ones() -> None:
    """All tensors of the state dict, the fixed tables included."""
    with torch.device("meta"):
        models = [
            mae.Config().build(224, PartialConfig(), False),
            mae.Config(ViTConfig(16, 1024, 24, 16)).build(224, PartialConfig(), False),
            um_mae.Config().build(256, PartialConfig(), False),
            um_mae.Config(
                SwinConfig(192, (2, 2, 18, 2), (6, 12, 24, 48), pos_mlp_dim=64), DecoderConfig(depth=8)
            ).build(256, PartialConfig(), False),
        ]
    counts = [sum(tensor.numel() for tensor in model.state_dict().values()) for model in models]
    assert counts == [111_907_840, 329_541_888, 35_905_418, 223_829_684]


def test_blocks_are_all_transformer_blocks() -> None:
    small = um_mae.Config(SwinConfig(8, (1, 2, 1, 1), (1, 1, 1, 1)), DecoderConfig(16, 2, 2))
    with torch.device("meta"):
        model = small.build(128, PartialConfig(), True)
    assert len(model.blocks()) == 5 + 2
    assert len(mae.MAE(32, replace(mae.Config(), encoder=ViTConfig(16, 24, 3, 2))).blocks()) == 3 + 8
