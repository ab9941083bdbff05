"""Every kind of pre-trained encoder for whole images: what it computes, what is left behind, other image sizes."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.methods.tiny import METHODS
from ummim.backbones.pvt import PVT, PVTConfig
from ummim.backbones.relative_vit import RelativeViTConfig
from ummim.backbones.swin import Swin, SwinConfig
from ummim.backbones.table_swin import TableSwin, TableSwinConfig
from ummim.backbones.vit import ViTConfig
from ummim.downstream.adapt import Adapted, for_whole_images, image_size_of, new_encoder
from ummim.downstream.relative_vit import BlockwiseViT
from ummim.errors import UserError
from ummim.methods import local_mim
from ummim.nn.aggregation import PartialConfig

COMPACT = ("um_mae", "um_mae_pvt")  # their windows and pooling widen
LARGER = {24: 32, 32: 48, 64: 128, 128: 192}


def backbone_of(name: str, config: Any = None) -> Any:
    """A tiny method's encoder with weights that matter."""
    torch.manual_seed(0)
    tiny = METHODS[name]
    method = (config or tiny.config).for_inference().build(tiny.image_size, PartialConfig(), False)
    for parameter in method.parameters():
        nn.init.normal_(parameter, std=0.2)
    return method.backbone().double().eval()


def pictures(encoder: Any) -> torch.Tensor:
    side = image_size_of(encoder)
    return torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tokens(encoder: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x = encoder(images)
    return x if x.ndim == 3 else x.flatten(1, 2)


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(COMPACT)))
def test_it_computes_what_the_pre_trained_one_does_of_whole_images(name: str) -> None:
    pretrained = backbone_of(name)
    adapted = for_whole_images(pretrained)
    encoder, images = adapted.encoder, pictures(pretrained)
    if adapted.fresh:  # LocalMIM's Swin has no norm behind its last stage
        assert (name, adapted.fresh) == ("local_mim_swin", ("norm.weight", "norm.bias"))
        encoder.norm = nn.Identity()
    torch.testing.assert_close(tokens(encoder, images), tokens(pretrained, images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_every_tensor_is_used_or_named(name: str) -> None:
    pretrained = backbone_of(name)
    given = {key: value.clone() for key, value in pretrained.state_dict().items()}
    adapted = for_whole_images(pretrained)
    shared = {"rel_pos_bias.relative_position_bias_table"} if name == "simmim" else set()
    assert set(given) == set(adapted.left) | shared | (set(adapted.encoder.state_dict()) & set(given))
    assert set(adapted.left) <= {"mask_token", "vis_mask_token"}
    assert not any("mask_token" in key for key in adapted.encoder.state_dict())
    assert adapted.resized == ()
    for key, value in adapted.encoder.state_dict().items():
        assert value.dtype == torch.float64
        if key in given:
            assert value.equal(given[key]), key
        value.add_(1)
    assert all(value.equal(given[key]) for key, value in pretrained.state_dict().items())  # a copy


@pytest.mark.parametrize("name", METHODS)
def test_adapting_twice_changes_nothing(name: str) -> None:
    first = for_whole_images(backbone_of(name))
    second = for_whole_images(first.encoder)
    assert second[1:] == ((), (), ())
    assert second.encoder.config == first.encoder.config
    images = pictures(first.encoder)
    assert tokens(first.encoder, images).equal(tokens(second.encoder, images))


@pytest.mark.parametrize("name", METHODS)
def test_another_image_size_is_taken_and_back_again(name: str) -> None:
    pretrained = backbone_of(name)
    size = LARGER[image_size_of(pretrained)]
    adapted = for_whole_images(pretrained, size)
    assert image_size_of(adapted.encoder) == size
    count = (size // 16) ** 2
    if hasattr(adapted.encoder.config, "patch_size"):
        count = 1 + (size // adapted.encoder.config.patch_size) ** 2
    elif isinstance(adapted.encoder, (TableSwin, Swin, PVT)):
        count = (size // 32) ** 2
    assert tokens(adapted.encoder, pictures(adapted.encoder)).shape[1] == count
    learned = [key for key in pretrained.state_dict() if "pos_embed" in key or key.endswith("bias_table")]
    assert bool(adapted.resized) == bool(learned)  # position MLPs (UM-MAE's Swin) fit every size
    back = for_whole_images(adapted.encoder, image_size_of(pretrained))
    for key, value in for_whole_images(pretrained).encoder.state_dict().items():
        if key not in adapted.resized and key not in adapted.fresh:
            assert value.equal(back.encoder.state_dict()[key]), key


def test_windows_and_tables_grow_with_the_image() -> None:
    with torch.device("meta"):
        swin = TableSwin(192, TableSwinConfig(8, (1, 1, 2, 1), (1, 1, 2, 2), window_size=6))
    for size, window, rows in ((224, 7, 169), (192, 6, 121), (384, 12, 529)):
        encoder = for_whole_images(swin.to_empty(device="cpu"), size).encoder
        assert isinstance(encoder, TableSwin)
        assert encoder.config.window_size == window
        tables = [v for k, v in encoder.state_dict().items() if k.endswith("bias_table")]
        assert [len(table) for table in tables] == [rows] * 5
    compact = Swin(256, SwinConfig(8, (1, 1, 1, 1), (1, 1, 2, 2), window_size=8, pos_mlp_dim=4))
    grown = for_whole_images(compact, 224).encoder
    assert isinstance(grown, Swin)
    assert (grown.config.window_size, grown.hiding) == (14, "replace")


def test_a_shared_table_becomes_every_blocks_own() -> None:
    pretrained = backbone_of("simmim")
    table = pretrained.rel_pos_bias.relative_position_bias_table
    encoder = for_whole_images(pretrained).encoder
    assert isinstance(encoder, BlockwiseViT)
    own = [v for k, v in encoder.named_parameters() if k.endswith("relative_position_bias_table")]
    assert len(own) == len(encoder.blocks) == 2
    assert all(value.equal(table) for value in own)
    images = pictures(encoder)
    encoder(images).square().sum().backward()
    gradients = [value.grad for value in own]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    first, second = gradients
    assert first is not None
    assert second is not None
    assert not first.equal(second)
    with pytest.raises(ValueError, match="no mask token"):
        encoder(images, object())


def test_merges_of_the_other_order_are_put_right() -> None:
    """LocalMIM's official pre-training joins 2x2 tokens row by row; Microsoft's Swin column by column."""
    config = METHODS["local_mim_swin"].config
    assert isinstance(config, local_mim.Config)
    by_rows = local_mim.Config(config.encoder, config.decoder, target="pixel", row_major_merge=True)
    pretrained = backbone_of("local_mim_swin", by_rows)
    adapted = for_whole_images(pretrained)
    adapted.encoder.norm = nn.Identity()
    images = pictures(pretrained)
    torch.testing.assert_close(tokens(adapted.encoder, images), tokens(pretrained, images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (ViTConfig(16, 24, 1, 3), 100, "data.image_size, for images of 100 pixels: .*no multiple of the patch size 16"),
        (ViTConfig(16, 25, 1, 3), 32, "encoder.num_heads, .*3 heads do not divide the width 25"),
        (RelativeViTConfig(16, 24, 1, 5), 32, "5 heads do not divide"),
        (TableSwinConfig(8, (1, 1, 1, 1), (1, 1, 2, 2), 5), 224, "a window of 5 does not divide the 56x56 tokens"),
        (SwinConfig(8, (1, 1, 1, 1), (1, 1, 2, 2), 16), 200, "200 pixels do not make four stages"),
        (PVTConfig(sr_ratios=(8, 4, 2, 2)), 224, "squares of 2 do not divide the 7x7 tokens"),
    ],
)
def test_sizes_that_do_not_fit_are_one_message(config: Any, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        new_encoder(config, size)


def test_windows_that_cannot_follow_are_one_message() -> None:
    swin = TableSwin(224, TableSwinConfig(8, (1, 1, 1, 1), (1, 1, 2, 2), window_size=7))
    with pytest.raises(UserError, match="images of 240 pixels: windows of 7 tokens at 224 pixels"):
        for_whole_images(swin, 240)


def test_a_new_encoder_starts_as_a_pre_training_does() -> None:
    torch.manual_seed(0)
    encoder = new_encoder(RelativeViTConfig(4, 24, 2, 3, drop_path=0.0), 24)
    tables = [value for key, value in encoder.named_parameters() if key.endswith("bias_table")]
    assert len(tables) == 2
    assert all(value.eq(0).all() for value in tables)
    adapted: Adapted = for_whole_images(encoder)
    assert adapted[1:] == ((), (), ())
