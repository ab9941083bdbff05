"""Encoders from folders of transformers and files of timm: the features of those libraries' own models."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.interop.exports import CHECKPOINT, images_of, shaken, tiny
from ummim.backbones.vit import ViTConfig
from ummim.data.config import LabelledDataConfig
from ummim.downstream.classify import build_classifier
from ummim.downstream.encoders import load_encoder
from ummim.downstream.recipe import ClassifyConfig, ClassifyRecipe
from ummim.downstream.task import encoder_from_scratch, resolved
from ummim.errors import UserError
from ummim.interop.export import export
from ummim.interop.load import load_init

SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 32}
SWIN: dict[str, Any] = {
    "embed_dim": 8,
    "depths": (1, 2, 1, 1),
    "num_heads": (1, 2, 2, 4),
    "window_size": 2,
    "img_size": 64,
}
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", SMALL),
    "average": ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg", "fc_norm": True}),
    "shared": ("beit_base_patch16_224", {**SMALL, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "each block": ("beit_base_patch16_224", {**SMALL, "init_values": None}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
}
HF = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
      "intermediate_size": 48}  # fmt: skip
HF_SWIN = {"image_size": 64, "embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 2}


def features(encoder: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        found = encoder(images)
    return found if found.ndim == 3 else found.flatten(1, 2)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", TIMM)
def test_a_timm_file_has_timms_features(kind: str, tmp_path: Path) -> None:
    name, kwargs = TIMM[kind]
    heads = {} if kind == "swin" else {"num_heads": 3}
    model: Any = shaken(timm.create_model(name, pretrained=False, num_classes=7, **kwargs))
    side = kwargs["img_size"]
    images = torch.randn(2, 3, side, side)
    # heads that no tensor tells stand in the metadata that ummim export writes; else they are 64 wide
    metadata = {"architecture": name, "kwargs": json.dumps(heads)}
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "a.safetensors", metadata
    )
    encoder, told = load_encoder(tmp_path / "a.safetensors")
    with torch.no_grad():
        expected = model.forward_features(images)
    assert_equal(features(encoder, images), expected if expected.ndim == 3 else expected.flatten(1, 2))
    assert told["format"] == "timm" and all(key.startswith(("head.", "fc_norm.")) for key in told["left"])
    assert {"head.weight", "head.fc.weight"} & set(told["left"]) and not told["fresh"]


def test_a_timm_file_of_torchs_with_heads_64_wide(tmp_path: Path) -> None:
    model: Any = shaken(timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=1, img_size=32))
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    encoder, told = load_encoder(tmp_path / "timm.pth", image_size=48)
    assert encoder.config == ViTConfig(16, 192, 1, 3)
    assert told["resized"] == ["pos_embed"] and encoder.grid == (3, 3)


HUGGING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTModel", "ViTConfig", HF),
    "vit without biases": ("ViTForImageClassification", "ViTConfig", {**HF, "qkv_bias": False}),
    "vit_mae": ("ViTMAEForPreTraining", "ViTMAEConfig", {**HF, "mask_ratio": 0.0}),
    "beit, shared": ("BeitModel", "BeitConfig", {**HF, "use_shared_relative_position_bias": True,
                                                 "use_mean_pooling": False}),
    "beit, each block": ("BeitForImageClassification", "BeitConfig", {**HF, "use_relative_position_bias": True}),
    "beit, plain": ("BeitModel", "BeitConfig", {**HF, "use_absolute_position_embeddings": True,
                                                "layer_scale_init_value": 0.0}),
    "swin": ("SwinModel", "SwinConfig", HF_SWIN),
    "swin, masked": ("SwinForMaskedImageModeling", "SwinConfig", HF_SWIN),
}  # fmt: skip


@pytest.mark.parametrize("kind", HUGGING)
def test_a_folder_of_transformers_has_its_features(kind: str, tmp_path: Path) -> None:
    """As its own save_pretrained writes it, with its own defaults, such as norms of eps 1e-12."""
    transformers = pytest.importorskip("transformers", reason="pip install 'ummim[huggingface]'")
    name, config, sizes = HUGGING[kind]
    model = shaken(getattr(transformers, name)(getattr(transformers, config)(**sizes)))
    model.save_pretrained(tmp_path / "hub")
    encoder, told = load_encoder(tmp_path / "hub")
    images = torch.randn(2, 3, sizes["image_size"], sizes["image_size"])
    inner: Any = getattr(model, config.removesuffix("Config").lower().replace("vitmae", "vit"), model)
    with torch.no_grad():
        output = inner(images, noise=torch.arange(16.0).expand(2, 16)) if name.startswith("ViTMAE") else inner(images)
    assert_equal(features(encoder, images), output.last_hidden_state)
    assert told["format"] == "huggingface" and told["recipe"] == f"transformers' {name}" and not told["fresh"]
    outside = ("decoder.", "classifier.", "pooler.", "beit.pooler.", "head.", "embed.", "swin.embeddings.mask_token")
    assert all(key.startswith((*outside, "mask_token")) for key in told["left"])


@pytest.mark.parametrize("name", ["mae", "simmim", "simmim_swin", "green_mim", "local_mim"])
@pytest.mark.parametrize("form", ["huggingface", "timm"])
def test_what_we_export_comes_back_with_equal_features(name: str, form: str, tmp_path: Path) -> None:
    if form == "huggingface":
        pytest.importorskip("transformers", reason="pip install 'ummim[huggingface]'")
    recipe, method = tiny(name)
    out = tmp_path / ("hub" if form == "huggingface" else "a.safetensors")
    path = export(recipe, method, CHECKPOINT, out, form).path
    encoder, told = load_encoder(path)
    expected = features(method.backbone(), images_of(recipe))
    if name == "local_mim" and form == "huggingface":  # whose class has a final norm, a fresh one
        expected = nn.functional.layer_norm(expected, expected.shape[-1:], eps=1e-6)
    assert_equal(features(encoder, images_of(recipe)), expected)
    assert len(told["sha256"]) == 64


def test_an_eps_of_another_library_stays_with_the_run(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install 'ummim[huggingface]'")
    shaken(transformers.ViTModel(transformers.ViTConfig(**HF))).save_pretrained(tmp_path / "hub")
    encoder, _ = load_encoder(tmp_path / "hub")
    asked = ClassifyRecipe(
        classify=ClassifyConfig(weights="hub", classes=5, val_shards="v"), data=LabelledDataConfig("s", image_size=32)
    )
    found = resolved(asked, encoder)
    assert found.classify.norm_eps == 1e-12
    again = shaken(build_classifier(encoder_from_scratch(found), 5))
    assert {module.eps for module in again.modules() if isinstance(module, nn.LayerNorm)} == {1e-12}
    for out, form in (("again", "huggingface"), ("again.safetensors", "timm")):
        path = export(found, again, CHECKPOINT, tmp_path / out, form).path  # checked there
        back, _ = load_encoder(path)
        assert {module.eps for module in back.modules() if isinstance(module, nn.LayerNorm)} == {1e-12}


def test_what_ours_cannot_compute_is_refused_by_both_readers(tmp_path: Path) -> None:
    recipe, method = tiny("mae")
    vit: Any = timm.create_model("vit_tiny_patch16_224", pretrained=False, **SMALL, init_values=0.1)
    swin: Any = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, **SWIN)
    resnet = {"conv1.weight": torch.zeros(2, 3, 3, 3)}
    names = {key.replace("layers.1.downsample", "layers.0.downsample"): v for key, v in swin.state_dict().items()}
    fewer = {key: value for key, value in vit.state_dict().items() if "ls" not in key and key != "cls_token"}
    configs = {
        "gelu": ({"model_type": "vit", "hidden_act": "relu"}, "hidden_act = 'relu': only 'gelu' is supported"),
        "bert": ({"model_type": "bert"}, "model_type = 'bert': can be read are vit_mae, vit, beit, swin"),
        "none": ({"model_type": "vit"}, "has a config.json, but neither model.safetensors nor pytorch_model.bin"),
        "wide": ({"model_type": "vit", "image_size": [2, 3]}, r"image_size = \[2, 3\]: only squares"),
        "both": ({"model_type": "swin", "window_size": 14}, "window_size = 14: is wider than the last stage's map"),
    }
    for folder, (config, _) in configs.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        if folder != "none":
            save_file({"x": torch.zeros(1)}, tmp_path / folder / "model.safetensors")
    for name, tensors, message in (
        ("scaled", vit.state_dict(), "read as a timm ViT: .*left-over keys: blocks.0.ls1.gamma"),
        ("fewer", fewer, "missing keys: cls_token"),
        ("microsoft", names, "named as in Microsoft's code, not timm's: name the family"),
        ("resnet", resnet, r"neither of ummim export nor a timm ViT, BEiT or Swin \(it holds conv1.weight\)"),
        *((folder, None, message) for folder, (_, message) in configs.items()),
    ):
        path = tmp_path / (name if tensors is None else f"{name}.pth")
        if tensors is not None:
            torch.save(tensors, path)
        for read in (lambda path=path: load_encoder(path), lambda path=path: load_init(method, path)):
            with pytest.raises(UserError, match=message):
                read()


def test_a_folder_with_a_tensor_too_many_or_too_few_names_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="pip install 'ummim[huggingface]'")
    recipe, method = tiny("mae")
    path = export(recipe, method, CHECKPOINT, tmp_path / "hub", "huggingface").path
    whole = load_file(path / "model.safetensors")
    key = "vit.encoder.layer.0.output.dense.bias"
    for tensors, message in (
        ({**whole, "vit.encoder.layer.0.extra": torch.zeros(1)}, "no place for: vit.encoder.layer.0.extra"),
        ({name: value for name, value in whole.items() if name != key}, "missing keys: blocks.0.mlp.fc2.bias"),
        ({**whole, key: torch.zeros(3)}, r"mis-shaped keys: blocks.0.mlp.fc2.bias \(3,\)"),
    ):
        save_file(tensors, path / "model.safetensors")
        with pytest.raises(UserError, match=f"{path}: .*{message}"):
            load_encoder(path)
