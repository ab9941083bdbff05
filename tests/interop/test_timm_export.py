"""Encoders exported to timm: strict loading and equal features."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ummim.backbones.swin import Swin, SwinConfig
from ummim.backbones.vit import ViT, ViTConfig
from ummim.errors import UserError
from ummim.interop import export_timm, write_timm
from ummim.interop.timm import TIMM_VITS
from ummim.methods import mae, tec
from ummim.nn.decoder import DecoderConfig


def encoder_of(config: ViTConfig, image_size: int) -> ViT:
    torch.manual_seed(0)
    encoder = ViT(image_size, config)
    for parameter in encoder.parameters():  # away from zero biases and unit norms
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return encoder.eval()


def assert_same_features(encoder: ViT, model: Any, image_size: int) -> None:
    images = torch.randn(2, 3, image_size, image_size)
    model.eval()
    with torch.no_grad():
        expected = encoder(images)
        torch.testing.assert_close(model.forward_features(images), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(images), expected[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "image_size", "name"),
    [
        (ViTConfig(16, 384, 12, 6), 224, "vit_small_patch16_224"),
        (ViTConfig(16, 192, 12, 3), 96, "vit_tiny_patch16_224"),
        (ViTConfig(4, 36, 3, 3, 2.0), 20, "vit_base_patch16_224"),
        (ViTConfig(14, 64, 2, 2), 56, "vit_base_patch16_224"),
    ],
)
def test_create_model_loads_strictly_and_features_are_equal(
    tmp_path: Path, config: ViTConfig, image_size: int, name: str
) -> None:
    encoder = encoder_of(config, image_size)
    path = tmp_path / "encoder.safetensors"
    write_timm(encoder, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    kwargs = json.loads(metadata["kwargs"])
    assert metadata["architecture"] == name
    model = timm.create_model(name, pretrained=False, **kwargs)
    model.load_state_dict(load_file(path), strict=True)
    assert_same_features(encoder, model, image_size)
    by_path = timm.create_model(name, checkpoint_path=str(path), **kwargs)
    assert_same_features(encoder, by_path, image_size)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (ViTConfig(16, 768, 12, 12), "vit_base_patch16_224"),
        (ViTConfig(16, 1024, 24, 16), "vit_large_patch16_224"),
        (ViTConfig(14, 1280, 32, 16), "vit_huge_patch14_224"),
        (ViTConfig(32, 768, 12, 12), "vit_base_patch32_224"),
    ],
)
def test_published_sizes_need_only_the_name(config: ViTConfig, name: str) -> None:
    with torch.device("meta"):
        tensors, found, kwargs = export_timm(ViT(224, config))
        model = timm.create_model(found, pretrained=False, **kwargs)
    assert found == name
    assert kwargs == {"num_classes": 0, "global_pool": "token"}
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in tensors.items()} == expected


def test_every_name_is_timms_model_of_that_size() -> None:
    with torch.device("meta"):
        for (patch, width, depth, heads), name in TIMM_VITS.items():
            model: Any = timm.create_model(name, pretrained=False, num_classes=0)
            assert type(model).__name__ == VisionTransformer.__name__
            block = model.blocks[0]
            found = (model.patch_embed.patch_size[0], model.embed_dim, len(model.blocks), block.attn.num_heads)
            assert found == (patch, width, depth, heads)
            assert model.norm.eps == block.norm1.eps == 1e-6
            assert model.pos_embed.shape[1] == 1 + (224 // patch) ** 2


def test_a_whole_method_exports_its_encoder() -> None:
    config = mae.Config(ViTConfig(8, 32, 2, 2), DecoderConfig(16, 1, 2))
    method = mae.MAE(32, config)
    tensors, _, _ = export_timm(method)
    expected = method.encoder.state_dict()
    assert tensors.keys() == expected.keys()
    assert "mask_token" not in tensors
    assert tensors["pos_embed"].equal(expected["pos_embed"])


def test_a_method_exports_its_backbone() -> None:
    """TEC's encoder has an MLP on its class token, which its backbone has not."""
    encoder = ViTConfig(patch_size=16, embed_dim=64, depth=3, num_heads=2)
    method = tec.TEC(64, tec.Config(encoder, DecoderConfig(16, 1, 4)), nn.Identity())
    tensors, name, kwargs = export_timm(method)
    twin: Any = timm.create_model(name, **kwargs)
    twin.load_state_dict(tensors, strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = method.backbone()(images)
        torch.testing.assert_close(method.encoder(images), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(twin.eval().forward_features(images), expected, rtol=1e-5, atol=1e-5)


def test_an_encoder_without_a_twin_in_timm_is_the_users_mistake(tmp_path: Path) -> None:
    swin = Swin(64, SwinConfig(8, (1, 1, 1, 1), (1, 1, 1, 1), pos_mlp_dim=4))
    with pytest.raises(UserError, match="--format official"):
        export_timm(swin)
    with pytest.raises(UserError, match="timm has no model like this Swin"):
        write_timm(swin, tmp_path / "swin.safetensors")
    assert not list(tmp_path.iterdir())
