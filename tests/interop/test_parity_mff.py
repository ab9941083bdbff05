"""MFF: mmpretrain's checkpoints in and out, and a full-size model in float64 against a recorded number.

It is not mmpretrain's own result: others made it of MAE's official modules and a fusion written from the paper.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.interop.fixtures import KEYS, images, random_mask, weights
from ummim.backbones.vit import ViTConfig
from ummim.interop import load_official, save_official
from ummim.interop.official import official_names
from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.methods.mff import MFF, Config
from ummim.nn.decoder import DecoderConfig

TAPS = 6
FUSION = {
    "proj_weights": [TAPS, 1, 1, 1],
    **{
        f"proj_layers.{k}.{leaf}": [768, 768] if leaf == "weight" else [768]
        for k in range(TAPS - 1)
        for leaf in ("weight", "bias")
    },
}
SMALL = Config(
    ViTConfig(patch_size=8, embed_dim=36, depth=4, num_heads=3, mlp_ratio=2.0),
    DecoderConfig(embed_dim=24, depth=2, num_heads=4, mlp_ratio=2.0),
    taps=(0, 1, 3),
)
GIVEN = {"num_heads": 3, "decoder_num_heads": 4, "taps": (0, 1, 3)}  # what the tensors do not tell


def mmpretrain(key: str) -> str:
    """mmpretrain's name of a tensor, from MAE's."""
    if key.startswith("pr_dwconv."):
        return key
    for pattern, name in (
        (r"blocks\.(\d+)\.norm(\d)\.", r"blocks.\1.ln\2."),
        (r"mlp\.fc1\.", "ffn.layers.0.0."),
        (r"mlp\.fc2\.", "ffn.layers.1."),
        (r"^blocks\.", "layers."),
        (r"^patch_embed\.proj\.", "patch_embed.projection."),
        (r"^(decoder_)?norm\.", r"\1ln1."),
    ):
        key = re.sub(pattern, name, key)
    if key.startswith(("decoder_", "mask_token")):
        return f"neck.{key.replace('decoder_ln1', 'ln1')}"
    return f"backbone.{key}"


def small(throwing: bool = False) -> MFF:
    torch.manual_seed(0)
    model = MFF(32, SMALL, throwing=throwing)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def plan_of(throw: float = 0.0) -> MaskPlan:
    sampler = PlanSampler((4, 4), MaskConfig(), throw)
    return sampler.stack([sampler(seed) for seed in range(2)])


def test_mff_with_normalised_pixels() -> None:
    named = {mmpretrain(key): tensor for key, tensor in weights({**KEYS["mae_vit"], **FUSION}).items()}
    model = load_official("mff_vit", named)
    output = model(images(224), MaskPlan.from_mask(random_mask()))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(2.0368626479, abs=6e-11)
    parameters, grads = dict(model.named_parameters()), {}
    for official, ours in official_names(model, "mff_vit").items():
        if ours in parameters:
            grad = parameters[ours].grad
            assert grad is not None, official
            grads[official] = grad.norm()
    patch = grads["backbone.patch_embed.projection.weight"].item()
    assert patch == pytest.approx(3.71289289e-01, rel=3e-9)
    assert torch.stack(list(grads.values())).norm().item() == pytest.approx(5.69824285, rel=3e-9)


def test_names_order_and_shapes_are_mmpretrains() -> None:
    with torch.device("meta"):
        saved = save_official(MFF(224, Config()), "mff_vit")
    expected = {mmpretrain(key): shape for key, shape in {**KEYS["mae_vit"], **FUSION}.items()}
    assert {key: list(tensor.shape) for key, tensor in saved.items()} == expected
    order = list(saved)
    assert order[:4] == [
        "backbone.cls_token", "backbone.pos_embed", "backbone.proj_weights", "backbone.patch_embed.projection.weight",
    ]  # fmt: skip
    assert order[5:17] == [
        f"backbone.layers.0.{part}.{leaf}"
        for part in ("ln1", "attn.qkv", "attn.proj", "ln2", "ffn.layers.0.0", "ffn.layers.1")
        for leaf in ("weight", "bias")
    ]
    assert (
        order.index("backbone.ln1.bias") < order.index("backbone.proj_layers.0.weight") < order.index("neck.mask_token")
    )
    assert order[-4:] == ["neck.ln1.weight", "neck.ln1.bias", "neck.decoder_pred.weight", "neck.decoder_pred.bias"]


@pytest.mark.parametrize("throwing", [False, True])
def test_saving_inverts_loading_to_the_byte(throwing: bool) -> None:
    first = save_official(small(throwing), "mff_vit")
    assert (mmpretrain("pr_dwconv.weight") in first) == throwing
    model = load_official("mff_vit", first, **GIVEN)
    again = save_official(model, "mff_vit")
    assert list(again) == list(first)
    for key, tensor in first.items():
        assert again[key].numpy().tobytes() == tensor.numpy().tobytes(), key
    plan, pixels = plan_of(0.5 if throwing else 0.0), torch.randn(2, 3, 32, 32)
    assert model(pixels, plan).loss == small(throwing)(pixels, plan).loss


def test_the_checkpoints_position_tables_stay() -> None:
    """mmpretrain's tables are the transpose of MAE's: they come from the checkpoint, never from a formula."""
    tensors = save_official(small(), "mff_vit")
    for key, width in (("backbone.pos_embed", 36), ("neck.decoder_pos_embed", 24)):
        table = tensors[key].clone()
        table[:, 1:] = table[:, 1:].view(1, 4, 4, width).transpose(1, 2).reshape(1, 16, width)
        assert not table.equal(tensors[key])
        tensors[key] = table
    model = load_official("mff_vit", tensors, **GIVEN)
    for key in ("backbone.pos_embed", "neck.decoder_pos_embed"):
        assert save_official(model, "mff_vit")[key].equal(tensors[key])
    pixels = torch.randn(2, 3, 32, 32)
    masked = plan_of().mask()
    turned = masked.view(2, 4, 4).transpose(1, 2)  # the same model on transposed images has MAE's tables
    swapped = small()
    with torch.no_grad():
        kernel = swapped.encoder.patch_embed.proj.weight
        kernel.copy_(kernel.transpose(2, 3).clone())
        for parameter in (swapped.head.pred.weight, swapped.head.pred.bias):
            parameter.copy_(parameter.view(8, 8, 3, -1).transpose(0, 1).reshape(parameter.shape).clone())
    expected = swapped(pixels.transpose(2, 3), MaskPlan.from_mask(turned)).loss
    torch.testing.assert_close(model(pixels, MaskPlan.from_mask(masked)).loss, expected, rtol=1e-4, atol=1e-5)


def test_mmpretrains_container_and_a_file(tmp_path: Path) -> None:
    tensors = save_official(small(), "mff_vit")
    torch.save({"meta": {"epoch": 300}, "state_dict": tensors}, tmp_path / "epoch_300.pth")
    for source in ({"meta": {}, "state_dict": tensors}, tmp_path / "epoch_300.pth"):
        model = load_official("mff_vit", source, **GIVEN)
        assert model.encoder.config == SMALL.encoder


def test_the_published_taps_are_the_default_and_must_fit() -> None:
    tensors = save_official(small(), "mff_vit")
    with pytest.raises(ValueError, match=r"taps.*0 to 3"):  # six taps of twelve blocks
        load_official("mff_vit", tensors, **{**GIVEN, "taps": None})
    with pytest.raises(ValueError, match="missing keys: backbone.proj_layers.2.weight"):
        load_official("mff_vit", tensors, **{**GIVEN, "taps": (0, 1, 2, 3)})
    with torch.device("meta"):
        published: dict[str, Tensor] = save_official(MFF(224, Config()), "mff_vit")
    assert load_official("mff_vit", published).taps == (0, 2, 4, 6, 8, 11)


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_keys_that_do_not_fit_are_named(change: str) -> None:
    tensors = save_official(small(), "mff_vit")
    if change == "missing":
        del tensors["backbone.layers.2.ffn.layers.1.bias"]
        match = "missing keys: backbone.layers.2.ffn.layers.1.bias"
    else:
        tensors["backbone.ln2.weight"] = torch.ones(36)
        match = "left-over keys: backbone.ln2.weight"
    with pytest.raises(ValueError, match=match):
        load_official("mff_vit", tensors, **GIVEN)
