"""A teacher's weights out of other people's files."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ummim.backbones.teacher import Teacher, build_vit, load_vit
from ummim.backbones.vit import ViT, ViTConfig

SIDE = 64


def weights() -> dict[str, Tensor]:
    """Those of timm's ``test_vit``, and a final norm, which no teacher uses."""
    torch.manual_seed(1)
    own = {key: torch.randn_like(tensor) for key, tensor in build_vit("test_vit", SIDE).state_dict().items()}
    return {**own, "norm.weight": torch.ones(64), "norm.bias": torch.zeros(64)}


def assert_loads(path: Path) -> None:
    torch.manual_seed(2)
    vit = build_vit("test_vit", SIDE)
    load_vit(vit, path)
    for key, tensor in vit.state_dict().items():
        assert tensor.equal(weights()[key]), key


@pytest.mark.parametrize(
    "container",
    [
        lambda w: w,
        lambda w: {"model": w, "epoch": 3, "args": argparse.Namespace(lr=1.0)},
        lambda w: {"model": {**w, "mask_token": torch.zeros(1), "decoder_blocks.0.norm1.bias": torch.zeros(1)}},
        lambda w: {"state_dict": {**w, "head.weight": torch.zeros(1), "masked_embed": torch.zeros(1, 64)}},
        lambda w: {
            "student": {
                **{f"module.backbone.{key}": value for key, value in w.items()},
                "module.head.mlp.0.weight": torch.zeros(3),
            },
            "teacher": {f"backbone.{key}": value for key, value in w.items()},
            "epoch": 3,
        },
    ],
    ids=["bare", "MAE's encoder", "a whole MAE", "iBOT's teacher", "iBOT's run"],
)
def test_the_usual_containers(container: Any, tmp_path: Path) -> None:
    torch.save(container(weights()), tmp_path / "teacher.pth")
    assert_loads(tmp_path / "teacher.pth")


def test_an_encoder_of_ours_teaches(tmp_path: Path) -> None:
    """``ummim export`` writes an encoder's own names, which are timm's."""
    torch.manual_seed(0)
    encoder = ViT(224, ViTConfig(16, 192, 12, 3))
    save_file(dict(encoder.state_dict()), tmp_path / "encoder.safetensors", {"format": "pt"})
    vit = build_vit("vit_tiny_patch16_224", 224)
    load_vit(vit, tmp_path / "encoder.safetensors")
    images = torch.randn(1, 3, 224, 224)
    features = Teacher(vit, layers=1, top_k=3)(images, torch.float32).features
    expected = encoder.features(images, None, [11])[0][:, 1:]
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("blocks.3.mlp.fc1.bias"), r"missing keys: blocks.3.mlp.fc1.bias$"),
        (lambda w: w.update({"blocks.0.ls1.gamma": torch.ones(64)}), "left-over keys: blocks.0.ls1.gamma"),
        (lambda w: w.update({"pos_embed": torch.ones(1, 5, 64)}), r"pos_embed \(1, 5, 64\) instead of \(1, 17, 64\)"),
        (lambda w: w.clear(), "missing keys: cls_token, .* and [0-9]+ more"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(spoil: Any, message: str, tmp_path: Path) -> None:
    tensors = weights()
    spoil(tensors)
    torch.save(tensors, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=message):
        load_vit(build_vit("test_vit", SIDE), tmp_path / "teacher.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pth", None, "cannot be read: No such file"),
        ("none.safetensors", None, "cannot be read: No such file"),
        ("torn.pth", b"PK\x03\x04 torn", "cannot be read as a checkpoint"),
        ("empty.pth", b"", "cannot be read as a checkpoint"),
        ("junk.pth", b"junk", "cannot be read as a checkpoint: unpack requires"),
        ("page.pth", b"<!DOCTYPE html><html>404</html>", "cannot be read as a checkpoint"),
        ("torn.safetensors", b"torn", "cannot be read as a checkpoint"),
        ("evil.pth", b"cos\nsystem\n(S'false'\ntR.", "cannot be read as a checkpoint"),
    ],
)
def test_unreadable_files_are_one_message(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_vit(build_vit("test_vit", SIDE), tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_folder_and_a_list_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load_vit(build_vit("test_vit", SIDE), tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        load_vit(build_vit("test_vit", SIDE), tmp_path / "list.pth")
