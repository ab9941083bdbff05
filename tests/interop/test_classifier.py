"""Official fine-tuned checkpoints: the official code's numbers (docs/fidelity.md), keys, sizes, refusals."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.interop.fixtures import KEYS, fraction, images, weights
from ummim.backbones.pvt import PVTConfig
from ummim.backbones.swin import SwinConfig
from ummim.backbones.vit import ViTConfig
from ummim.downstream.classify import build_classifier
from ummim.interop import load_official_classifier, save_official
from ummim.methods import mae, um_mae
from ummim.nn.decoder import DecoderConfig

DECODER = DecoderConfig(embed_dim=24, depth=1, num_heads=4)
VIT = ViTConfig(patch_size=8, embed_dim=36, depth=3, num_heads=3, mlp_ratio=2.0)
SWIN = SwinConfig(8, (1, 2, 3, 2), (1, 2, 4, 8), window_size=2, mlp_ratio=2.0, pos_mlp_dim=6)
PVT = PVTConfig((8, 12, 16, 24), (1, 2, 1, 1), (1, 2, 4, 3), (2.0, 3.0, 2.0, 2.0), (2, 2, 1, 1))
SIZES: dict[str, dict[str, Any]] = {  # what tensors do not tell
    "mae_vit": {"num_heads": 3},
    "um_mae_vit": {"num_heads": 3},
    "um_mae_swin": {"img_size": 64, "window_size": 4},
    "um_mae_pvt": {"num_heads": (1, 2, 4, 3), "sr_ratios": (4, 4, 2, 1)},
}


def fine_tuned(keys: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, Any]:
    """What fine-tuning keeps of the pre-trained model's keys, and the head's."""
    left = ("vis_mask_token", "mask_token", "norm.", "decoder")
    return {key: value for key, value in keys.items() if not key.startswith(left)} | dict(head)


def head_keys(width: int, classes: int) -> dict[str, list[int]]:
    return {
        "fc_norm.weight": [width],
        "fc_norm.bias": [width],
        "head.weight": [classes, width],
        "head.bias": [classes],
    }


def fine_tuned_table(family: str) -> dict[str, Tensor]:
    """MAE's trained table is filled with sines and cosines, unrounded; PVT's like any other parameter."""
    if family == "mae_vit":
        omega = 10000.0 ** (-torch.arange(192, dtype=torch.float64) / 192)
        at = torch.arange(196)
        cols, rows = (each[:, None] * omega for each in (at % 14, at // 14))
        table = torch.cat([cols.sin(), cols.cos(), rows.sin(), rows.cos()], dim=1)
        return {"pos_embed": torch.cat([torch.zeros(1, 768), table])[None]}
    if family == "um_mae_pvt":
        shape = KEYS[family]["pos_embed"]
        index = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
        u = fraction(torch.sin(index * 12.9898 + (sum(b"pos_embed") % 1000) / 100) * 43758.5453)
        return {"pos_embed": 0.1 * (2 * u - 1).view(*shape)}
    return {}


@pytest.mark.parametrize(
    ("family", "side", "width", "parameters", "first", "total"),
    [
        ("mae_vit", 224, 768, 86_567_656, (0.2238949301, 1.0617931303, -0.9945919726), 1632.61044),
        ("um_mae_swin", 256, 768, 28_268_050, (1.0680212737, -0.3097244731, -1.8792271030), 1630.13025),
        ("um_mae_pvt", 256, 512, 21_546_728, (-0.5855538608, -0.1686882710, 0.4556077091), 1612.44462),
    ],
)
def test_logits_are_the_official_ones(
    family: str, side: int, width: int, parameters: int, first: tuple[float, ...], total: float
) -> None:
    tensors = weights(fine_tuned(KEYS[family], head_keys(width, 1000))) | fine_tuned_table(family)
    model = load_official_classifier(family, tensors, 1000).eval()
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == parameters
    with torch.no_grad():
        logits = model(images(side))
    assert logits.shape == (2, 1000)
    assert logits[0, :3].tolist() == pytest.approx(first, abs=6e-11)
    assert logits.abs().sum().item() == pytest.approx(total, abs=6e-6)


def pretrained(family: str) -> Any:
    torch.manual_seed(0)
    if family == "mae_vit":
        return mae.MAE(32, mae.Config(VIT, DECODER))
    encoders: dict[str, ViTConfig | SwinConfig | PVTConfig] = {
        "um_mae_vit": VIT, "um_mae_swin": SWIN, "um_mae_pvt": PVT
    }  # fmt: skip
    encoder = encoders[family]
    model = um_mae.UMMAE(32 if family == "um_mae_vit" else 64, um_mae.Config(encoder, DECODER))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def small(family: str, model: Any) -> dict[str, Tensor]:
    """The fine-tuned checkpoint of seven classes that a pre-trained model could have become."""
    tensors = save_official(model, family)
    head = {key: torch.randn(shape) for key, shape in head_keys(tensors["norm.weight"].shape[0], 7).items()}
    return fine_tuned(tensors, head)


@pytest.mark.parametrize("family", SIZES)
def test_equals_our_own_classifier_on_the_pre_trained_encoder(family: str) -> None:
    model = pretrained(family)
    tensors = small(family, model)
    own = build_classifier(model.encoder, 7)
    for module, name in ((own.fc_norm, "fc_norm"), (own.head, "head")):
        module.load_state_dict({key: tensors[f"{name}.{key}"] for key in ("weight", "bias")})
    loaded = load_official_classifier(family, tensors, 7, **SIZES[family])
    pictures = torch.randn(2, 3, 32, 32) if "vit" in family else torch.randn(2, 3, 64, 64)
    assert loaded(pictures).equal(own(pictures))
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == [n for n, _ in own.named_parameters()]
    assert loaded.double()(pictures.double()).dtype == torch.float64


@pytest.mark.parametrize("family", SIZES)
def test_every_tensor_is_accounted_for(family: str) -> None:
    tensors = small(family, pretrained(family))
    held = load_official_classifier(family, tensors, 7, **SIZES[family]).state_dict().values()
    assert sorted(t.double().sum().item() for t in held) == sorted(t.double().sum().item() for t in tensors.values())
    for key in tensors:
        without = {name: tensor for name, tensor in tensors.items() if name != key}
        with pytest.raises(ValueError, match="missing keys:") as error:
            load_official_classifier(family, without, 7, **SIZES[family])
        assert f"missing keys: {key}" in str(error.value)


@pytest.mark.parametrize(
    ("family", "change", "classes", "sizes", "message"),
    [
        ("mae_vit", {"norm.weight": torch.ones(36)}, 7, {}, "no fine-tuned mae_vit .*left-over keys: norm.weight"),
        ("um_mae_swin", {"vis_mask_token": torch.ones(1, 1, 8)}, 7, {}, "left-over keys: vis_mask_token"),
        ("um_mae_vit", {}, 10, {}, r"head.weight \(7, 36\) instead of \(10, 36\)"),
        ("um_mae_swin", {}, 7, {"window_size": 3}, "window_size: a window of 3 does not divide the 16x16 tokens"),
        ("um_mae_swin", {}, 7, {"sr_ratios": (8, 4, 2, 1)}, "um_mae_swin has no size sr_ratios"),
        ("um_mae_pvt", {}, 7, {"sr_ratios": (3, 4, 2, 1)}, "sr_ratios: squares of 3 do not divide the 16x16"),
        ("um_mae_pvt", {}, 7, {"img_size": 128}, r"pos_embed \(1, 256, 8\) instead of \(1, 1024, 8\)"),
        ("mae_vit", {}, 7, {"decoder_depth": 8}, "mae_vit has no size decoder_depth"),
        ("tec_vit", {}, 7, {}, "has no classifier; those that have one are: mae_vit, um_mae_vit"),
    ],
)
def test_keys_and_sizes_that_do_not_fit_are_named(
    family: str, change: dict[str, Tensor], classes: int, sizes: dict[str, Any], message: str
) -> None:
    known = family if family in SIZES else "mae_vit"
    tensors = small(known, pretrained(known)) | change
    with pytest.raises(ValueError, match=message):
        load_official_classifier(family, tensors, classes, **{**SIZES[known], **sizes})


def test_files_are_read_and_the_callers_tensors_are_copied(tmp_path: Path) -> None:
    tensors = small("mae_vit", pretrained("mae_vit"))
    torch.save({"model": tensors, "epoch": 99}, tmp_path / "finetuned.pth")
    model = load_official_classifier("mae_vit", tmp_path / "finetuned.pth", 7, num_heads=3)
    assert model.head.weight.equal(tensors["head.weight"])
    model = load_official_classifier("mae_vit", tensors, 7, num_heads=3)
    before = tensors["head.weight"].clone()
    nn.init.zeros_(model.head.weight)
    assert tensors["head.weight"].equal(before)
