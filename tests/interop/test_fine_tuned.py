"""Official fine-tuned files of SimMIM, GreenMIM, LocalMIM and MFF: logits of timm's models of the same architecture.

No such file is at hand: these are timm's own tensors under the names of the official codes, with the indices and masks
that those codes store beside them. Which model each repository fine-tunes, and how it pools, stands in its code:
SimMIM's ``vision_transformer.py`` and ``swin_transformer.py`` (GreenMIM's README names them, too), LocalMIM's
``ViT/models_vit.py`` and ``Swin/models_swin.py``, mmpretrain's ``configs/mff/benchmarks``.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.interop.exports import build, shaken, tiny
from tests.interop.fixtures import KEYS
from ummim.downstream.encoders import load_encoder
from ummim.interop import load_official_classifier, save_official
from ummim.interop.classifier import CLASSIFIERS, fine_tuned_classes
from ummim.interop.load import load_init

CLASSES = 7
EPS = partial(nn.LayerNorm, eps=1e-6)
VIT: dict[str, Any] = {
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "img_size": 32,
    "num_classes": CLASSES,
}
SWIN: dict[str, Any] = {"embed_dim": 8, "depths": (1, 2, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": 4,
                        "img_size": 64, "num_classes": CLASSES}  # fmt: skip
IN_BLOCKS = {"norm1": "ln1", "norm2": "ln2", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}  # mmpretrain's


def flat_vit() -> tuple[Any, dict[str, Tensor]]:
    """MAE's fine-tuned ViT, which is LocalMIM's: timm's names, the mean of the patch tokens, ``fc_norm``, the head."""
    model: Any = timm.create_model("vit_tiny_patch16_224", pretrained=False, global_pool="avg", fc_norm=True, **VIT)
    return shaken(model), model.state_dict()


def mff_vit() -> tuple[Any, dict[str, Tensor]]:
    """The same in mmpretrain: ``out_type='avg_featmap'``, whose norm is ``ln2``, and a LinearClsHead."""
    model, tensors = flat_vit()
    named = {}
    for key, tensor in tensors.items():
        key = key.replace("patch_embed.proj.", "patch_embed.projection.").replace("fc_norm.", "ln2.")
        if match := re.match(r"blocks\.(\d+)\.(norm\d|mlp\.fc\d|.*?)\.(weight|bias)$", key):
            key = f"layers.{match[1]}.{IN_BLOCKS.get(match[2], match[2])}.{match[3]}"
        named[key.replace("head.", "head.fc.") if key.startswith("head.") else f"backbone.{key}"] = tensor
    return model, named


def simmim_vit() -> tuple[Any, dict[str, Tensor]]:
    """BEiT's, a table in each block, no absolute positions, ``use_mean_pooling``."""
    model: Any = shaken(timm.create_model("beit_base_patch16_224", pretrained=False, init_values=0.1, **VIT))
    tensors = dict(model.state_dict())
    for i, block in enumerate(model.blocks):
        tensors[f"blocks.{i}.attn.relative_position_index"] = block.attn.relative_position_index
    return model, tensors


def swin() -> tuple[Any, dict[str, Tensor]]:
    """Microsoft's, which norms, then pools; a merge belongs to the stage before it, and each block stores its index
    and, where it is shifted, its mask."""
    model: Any = shaken(timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, **SWIN))
    tensors = {}
    for key, tensor in model.state_dict().items():
        key = re.sub(r"layers\.(\d)\.downsample", lambda at: f"layers.{int(at[1]) - 1}.downsample", key)
        tensors[key.replace("head.fc.", "head.")] = tensor
    for s, layer in enumerate(model.layers):
        for b, block in enumerate(layer.blocks):
            tensors[f"layers.{s}.blocks.{b}.attn.relative_position_index"] = block.attn.relative_position_index
            if block.attn_mask is not None:
                tensors[f"layers.{s}.blocks.{b}.attn_mask"] = block.attn_mask
    assert sum(key.endswith("attn_mask") for key in tensors) == 1  # windows of 4 on maps of 16, 8, 4 and 2 tokens
    return model, tensors


class PoolFirst(nn.Module):
    """LocalMIM's fine-tuned Swin on timm's: the mean, then the norm; norms of eps 1e-6 but those before the MLPs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.norm = model, model.norm
        model.norm = nn.Identity()
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5 if name.endswith("norm2") else 1e-6

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.model.forward_features(images).flatten(1, 2).mean(1)
        return self.model.head.fc(self.norm(pooled))


def local_mim_swin() -> tuple[Any, dict[str, Tensor]]:
    model, tensors = swin()
    return PoolFirst(model), tensors


FILES = {
    "mae_vit": flat_vit,
    "local_mim_vit": flat_vit,
    "mff_vit": mff_vit,
    "simmim_vit": simmim_vit,
    "simmim_swin": swin,
    "green_mim_swin": swin,
    "local_mim_swin": local_mim_swin,
}
SIZES: dict[str, dict[str, Any]] = {family: {"num_heads": 3} for family in ("mae_vit", "local_mim_vit", "mff_vit")}


@pytest.mark.parametrize("family", FILES)
def test_logits_are_those_of_the_same_architecture_in_timm(family: str, tmp_path: Path) -> None:
    model, tensors = FILES[family]()
    torch.save({"model": tensors, "epoch": 99}, tmp_path / "tuned.pth")
    sizes = SIZES.get(family, {})
    assert fine_tuned_classes(family, tensors) == CLASSES
    found = load_official_classifier(family, tmp_path / "tuned.pth", CLASSES, **sizes).eval()
    side = 64 if family.endswith("swin") else 32
    images = torch.randn(3, 3, side, side)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(found(images), expected, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(found.double()(images.double()), model.double()(images.double()))
    assert expected.abs().max() > 0.3
    encoder, told = load_encoder(tmp_path / "tuned.pth", family, **sizes)
    head = set(CLASSIFIERS[family].head)
    assert {key for key in tensors if key.startswith(tuple(head))} == set(told["left"])
    assert type(encoder) is type(found.encoder)


@pytest.mark.parametrize("family", ["mff_vit", "simmim_vit", "local_mim_swin"])
def test_every_tensor_counts(family: str) -> None:
    _, tensors = FILES[family]()
    sizes = SIZES.get(family, {})
    fixed = {key for key in tensors if key.endswith(("relative_position_index", "attn_mask"))}
    held = load_official_classifier(family, tensors, CLASSES, **sizes).state_dict().values()
    sums = [value.double().sum().item() for key, value in tensors.items() if key not in fixed]
    assert sorted(value.double().sum().item() for value in held) == sorted(sums)
    for key in (list(tensors)[5], next(key for key in tensors if "head." in key), *sorted(fixed)[:1]):
        without = {name: tensor for name, tensor in tensors.items() if name != key}
        with pytest.raises(ValueError, match=f"missing keys: {re.escape(key)}$"):
            load_official_classifier(family, without, CLASSES, **sizes)
    for key in sorted(fixed)[-2:]:
        with pytest.raises(ValueError, match=f"fixed tensors differ: {re.escape(key)}"):
            load_official_classifier(family, {**tensors, key: tensors[key] + 1}, CLASSES, **sizes)
    with pytest.raises(ValueError, match="left-over keys: mask_token"):
        load_official_classifier(family, {**tensors, "mask_token": torch.zeros(1, 1, 8)}, CLASSES, **sizes)


@pytest.mark.parametrize("family", ["simmim_vit", "simmim_swin"])
def test_full_size_names_and_shapes_follow_from_the_pre_trainings(family: str) -> None:
    """Off the key list of the official pre-training: without its prefix and mask token; a ViT's shared table and index
    become each block's, its norm ``fc_norm``."""
    expected: dict[str, tuple[int, ...]] = {}
    for key, shape in KEYS[family].items():
        name = key.removeprefix("encoder.")
        if name == "mask_token" or key.startswith("decoder."):
            continue
        if name.startswith("rel_pos_bias."):
            leaf = name.removeprefix("rel_pos_bias.")
            expected |= {f"blocks.{i}.attn.{leaf}": tuple(shape) for i in range(12)}
        elif family == "simmim_vit" and name.startswith("norm."):
            expected[f"fc_{name}"] = tuple(shape)
        else:
            expected[name] = tuple(shape)
    width = expected["norm.weight" if "norm.weight" in expected else "fc_norm.weight"][0]
    expected |= {"head.weight": (1000, width), "head.bias": (1000,)}
    empty = {key: torch.empty(shape, device="meta") for key, shape in expected.items()}
    kind = CLASSIFIERS[family]
    with torch.device("meta"):
        model = kind.build(empty, 1000, {})
    own, constants = model.state_dict(), kind.constants(model)
    found = {key: tuple(own[ours].shape) for key, ours in kind.names(model).items()}
    assert found | {key: tuple(value.shape) for key, value in constants.items()} == expected


@pytest.mark.parametrize("tuned", [False, True], ids=["encoder alone", "fine-tuned"])
def test_a_file_without_a_decoder_starts_a_pre_training(tuned: bool, tmp_path: Path) -> None:
    recipe, method = tiny("mae")
    tensors = {key: value for key, value in save_official(method, "mae_vit").items()
               if not key.startswith(("decoder", "mask_token", "norm." if tuned else "decoder"))}  # fmt: skip
    head = {"fc_norm.weight": torch.ones(24), "fc_norm.bias": torch.zeros(24), "head.weight": torch.ones(5, 24)}
    torch.save({"model": {**tensors, **({**head, "head.bias": torch.ones(5)} if tuned else {})}}, tmp_path / "a.pth")
    fresh = build(recipe)
    report = load_init(fresh, tmp_path / "a.pth", "mae_vit")
    own = {key for key in method.state_dict() if key.startswith("encoder.")}
    own -= {"encoder.norm.weight", "encoder.norm.bias"} if tuned else set()
    assert set(report.used) == own
    assert all(torch.equal(fresh.state_dict()[key], method.state_dict()[key]) for key in report.used)
    assert set(report.left_over) == ({*head, "head.bias"} if tuned else set())
