"""Swins and SimMIM's ViT exported to timm: strict loading, equal features, and another window or size afterwards."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.layers import resize_rel_pos_bias_table
from timm.models import beit, swin_transformer
from torch import Tensor, nn

from ummim.backbones.relative_vit import RelativeViT, RelativeViTConfig
from ummim.backbones.sparse_swin import SparseSwin
from ummim.backbones.table_swin import TableSwin, TableSwinConfig
from ummim.backbones.vit import ViT, ViTConfig
from ummim.errors import UserError
from ummim.interop import export_timm, write_timm
from ummim.interop.timm import TIMM_BEITS, TIMM_SWINS
from ummim.methods import simmim

SMALL = TableSwinConfig(16, (2, 2, 3, 2), (1, 2, 4, 8), window_size=6)


def shaken(encoder: Any) -> Any:
    """Away from zero tables and unit norms."""
    torch.manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return encoder.eval()


def written(encoder: nn.Module, path: Path) -> tuple[dict[str, Tensor], str, dict[str, Any], str]:
    write_timm(encoder, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return load_file(path), metadata["architecture"], json.loads(metadata["kwargs"]), metadata["norm_eps"]


@pytest.mark.parametrize(
    ("config", "image_size", "name"),
    [
        (SMALL, 192, "swin_base_patch4_window7_224"),
        (TableSwinConfig(16, (1, 1, 1, 1), (2, 2, 2, 2), 7, 2.0), 224, "swin_base_patch4_window7_224"),
        (TableSwinConfig(96, (2, 2, 6, 2), (3, 6, 12, 24), window_size=8), 64, "swin_tiny_patch4_window7_224"),
        (TableSwinConfig(16, (2, 2, 2, 2), (1, 2, 4, 8), window_size=12), 192, "swin_base_patch4_window7_224"),
    ],
)
def test_a_swin_loads_strictly_and_features_are_equal(
    tmp_path: Path, config: TableSwinConfig, image_size: int, name: str
) -> None:
    encoder = shaken(TableSwin(image_size, config))
    tensors, found, kwargs, eps = written(encoder, tmp_path / "swin.safetensors")
    assert (found, eps) == (name, "1e-05")
    images = torch.randn(2, 3, image_size, image_size)
    for model in (
        timm.create_model(found, pretrained=False, **kwargs),
        timm.create_model(found, checkpoint_path=str(tmp_path / "swin.safetensors"), **kwargs),
    ):
        twin: Any = model.eval()
        twin.load_state_dict(tensors, strict=True)
        with torch.no_grad():
            expected = encoder(images)
            torch.testing.assert_close(twin.forward_features(images), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(twin(images), expected.mean((1, 2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row_major", [False, True])
def test_a_sparse_swin_is_a_swin_of_another_eps(tmp_path: Path, row_major: bool) -> None:
    encoder = shaken(SparseSwin(192, SMALL, row_major_merge=row_major))
    tensors, name, kwargs, eps = written(encoder, tmp_path / "swin.safetensors")
    assert eps == "1e-06"
    twin: Any = timm.create_model(name, **kwargs, norm_layer=partial(nn.LayerNorm, eps=float(eps))).eval()
    twin.load_state_dict(tensors, strict=True)
    images = torch.randn(2, 3, 192, 192)
    with torch.no_grad():
        torch.testing.assert_close(twin.forward_features(images).flatten(1, 2), encoder(images), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
def test_another_window_and_size_after_timms_resizing() -> None:
    """Window 6 at 192 pixels into timm's own window 7 at 224, as for fine-tuning."""
    tensors, name, kwargs = export_timm(shaken(TableSwin(192, SMALL)))
    sizes = {key: value for key, value in kwargs.items() if key not in ("window_size", "img_size")}
    twin: Any = timm.create_model(name, **sizes).eval()
    twin.load_state_dict(swin_transformer.checkpoint_filter_fn(tensors, twin), strict=True)
    resized = {
        key: resize_rel_pos_bias_table(tensor, (7, 7), (169, tensor.shape[1]))
        if key.endswith("relative_position_bias_table")
        else tensor
        for key, tensor in tensors.items()
    }
    ours = TableSwin(224, TableSwinConfig(16, (2, 2, 3, 2), (1, 2, 4, 8), window_size=7)).eval()
    assert ours.load_state_dict(resized, strict=False).missing_keys == ["mask_token"]
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(twin.forward_features(images), ours(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "image_size"),
    [
        (RelativeViTConfig(8, 48, 3, 3, 2.0), 48),
        (RelativeViTConfig(16, 96, 2, 4), 224),
        (RelativeViTConfig(8, 48, 2, 3, relative_position=False, absolute_position=True), 48),  # AMT's
        (RelativeViTConfig(8, 48, 2, 3, absolute_position=True), 48),
        (RelativeViTConfig(8, 48, 2, 3, relative_position=False), 48),
    ],
)
def test_simmims_vit_is_a_beit_with_at_most_one_table(
    tmp_path: Path, config: RelativeViTConfig, image_size: int
) -> None:
    encoder = shaken(RelativeViT(image_size, config))
    tensors, name, kwargs, eps = written(encoder, tmp_path / "vit.safetensors")
    assert eps == "1e-06"
    twin: Any = timm.create_model(name, **kwargs).eval()
    twin.load_state_dict(tensors, strict=True)
    images = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        expected = encoder(images)
        torch.testing.assert_close(twin.forward_features(images), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(twin(images), expected[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
def test_simmims_vit_at_another_size_after_timms_resizing() -> None:
    config = RelativeViTConfig(8, 48, 3, 3)
    tensors, name, kwargs = export_timm(shaken(RelativeViT(48, config)))
    twin: Any = timm.create_model(name, **{**kwargs, "img_size": 64}).eval()
    twin.load_state_dict(beit.checkpoint_filter_fn(tensors, twin), strict=True)
    table = "rel_pos_bias.relative_position_bias_table"
    larger = RelativeViT(64, config).eval()
    resized = resize_rel_pos_bias_table(tensors[table], (8, 8), (15 * 15 + 3, 3))
    larger.load_state_dict({**tensors, table: resized}, strict=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(twin.forward_features(images), larger(images), rtol=1e-5, atol=1e-5)


def test_published_sizes_need_few_words() -> None:
    with torch.device("meta"):
        for (width, depths, heads), name in TIMM_SWINS.items():
            tensors, found, kwargs = export_timm(TableSwin(224, TableSwinConfig(width, depths, heads, 7)))
            assert (found, kwargs) == (name, {"num_classes": 0})
            twin = timm.create_model(name, **kwargs)
            assert {key: value.shape for key, value in tensors.items()} == shapes_of(twin)
        for (patch, width, depth, head), name in TIMM_BEITS.items():
            tensors, found, kwargs = export_timm(RelativeViT(224, RelativeViTConfig(patch, width, depth, head)))
            assert found == name
            assert {key: value.shape for key, value in tensors.items()} == shapes_of(timm.create_model(name, **kwargs))


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def test_a_method_exports_its_encoder_without_pre_trainings_tokens() -> None:
    method = simmim.SimMIM(64, simmim.Config(TableSwinConfig(8, (1, 1, 1, 1), (1, 1, 1, 1), 4)))
    tensors, _, kwargs = export_timm(method)
    assert "mask_token" not in tensors
    assert (kwargs["img_size"], kwargs["window_size"]) == (64, 4)
    um = ViT(32, ViTConfig(8, 32, 2, 2), secondary=True)
    assert "vis_mask_token" not in export_timm(um)[0]


def test_an_encoder_without_a_final_norm() -> None:
    raw = shaken(ViT(32, ViTConfig(8, 32, 2, 2), final_norm=False))
    tensors, name, kwargs = export_timm(raw)
    twin: Any = timm.create_model(name, **kwargs).eval()
    twin.load_state_dict(tensors, strict=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(twin.forward_features(images), raw(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="ends in a norm"):
        export_timm(SparseSwin(64, SMALL, final_norm=False))
