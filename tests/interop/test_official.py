"""Official checkpoints in and out: names, containers, sizes, and what is refused."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.interop.fixtures import KEYS, PR_KEYS, weights
from ummim.backbones.swin import SwinConfig
from ummim.backbones.vit import ViTConfig
from ummim.interop import load_official, save_official
from ummim.masking import MaskConfig, PlanSampler
from ummim.methods import mae, um_mae
from ummim.nn.aggregation import PartialConfig
from ummim.nn.decoder import DecoderConfig

DECODER = DecoderConfig(embed_dim=24, depth=2, num_heads=4, mlp_ratio=2.0)
MAE = mae.Config(ViTConfig(patch_size=8, embed_dim=36, depth=3, num_heads=3, mlp_ratio=2.0), DECODER)
SWIN = um_mae.Config(SwinConfig(8, (1, 2, 3, 2), (1, 2, 4, 8), window_size=4, mlp_ratio=2.0, pos_mlp_dim=6), DECODER)
HEADS: dict[str, dict[str, Any]] = {  # what tensors do not tell
    "mae_vit": {"num_heads": 3, "decoder_num_heads": 4},
    "um_mae_swin": {"window_size": 4, "decoder_num_heads": 4},
}


def small(family: str, throwing: bool = False) -> nn.Module:
    torch.manual_seed(0)
    if family == "mae_vit":
        return mae.MAE(32, MAE, PartialConfig(kernel_size=5), throwing)
    config = replace(SWIN, legacy_decoder_order=True)
    return um_mae.UMMAE(128, config, PartialConfig(kernel_size=5), throwing)


def loss_of(model: nn.Module, family: str, throw: float = 0.0) -> Tensor:
    mask = MaskConfig() if family == "mae_vit" else MaskConfig("uniform", 0.75, 0.25)
    sampler = PlanSampler(model.grid, mask, throw)  # type: ignore[arg-type]
    plan = sampler.stack([sampler(seed) for seed in range(2)])
    side = 32 if family == "mae_vit" else 128
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    return model(images, plan).loss


@pytest.mark.parametrize("family", HEADS)
def test_names_order_and_shapes_are_the_official_ones(family: str) -> None:
    with torch.device("meta"):
        model = mae.MAE(224, mae.Config()) if family == "mae_vit" else um_mae.UMMAE(256, um_mae.Config())
    saved = save_official(model, family)
    assert {key: list(tensor.shape) for key, tensor in saved.items()} == KEYS[family]
    assert list(saved) == list(KEYS[family])


@pytest.mark.parametrize("throwing", [False, True])
@pytest.mark.parametrize("family", HEADS)
def test_saving_inverts_loading_to_the_byte(family: str, throwing: bool) -> None:
    first = save_official(small(family, throwing), family)
    again = save_official(load_official(family, first, **HEADS[family]), family)
    assert list(again) == list(first)
    for key, tensor in first.items():
        assert again[key].dtype == tensor.dtype
        assert again[key].numpy().tobytes() == tensor.numpy().tobytes(), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_value_in_any_precision_survives(dtype: torch.dtype) -> None:
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-7, 3.0])
    tensors = {
        key: odd.repeat(tensor.numel())[: tensor.numel()].view(tensor.shape).to(dtype)
        for key, tensor in save_official(small("um_mae_swin"), "um_mae_swin").items()
    }
    again = save_official(load_official("um_mae_swin", tensors, **HEADS["um_mae_swin"]), "um_mae_swin")
    for key, tensor in tensors.items():
        assert again[key].dtype == dtype
        assert again[key].view(torch.uint8).equal(tensor.view(torch.uint8)), key


@pytest.mark.parametrize("throw", [0.0, 0.5])
@pytest.mark.parametrize("family", HEADS)
def test_a_loaded_model_computes_the_same_loss(family: str, throw: float) -> None:
    model = small(family, throw > 0)
    loaded = load_official(family, save_official(model, family), **HEADS[family])
    assert loss_of(loaded, family, throw) == loss_of(model, family, throw)
    loss_of(loaded, family, throw).backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trained


@pytest.mark.parametrize("family", HEADS)
def test_float64_on_request(family: str) -> None:
    model = load_official(family, save_official(small(family), family), **HEADS[family]).double()
    assert loss_of(model, family).item() == pytest.approx(loss_of(small(family), family).item(), rel=1e-5)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float64}


def test_every_container_holds_the_same_model(tmp_path: Path) -> None:
    tensors = save_official(small("mae_vit"), "mae_vit")
    args = argparse.Namespace(norm_pix_loss=False, model="mae_vit_base_patch16", lr=1e-3)
    torch.save({"model": tensors, "optimizer": {"state": {}}, "epoch": 3, "args": args}, tmp_path / "run.pth")
    torch.save(tensors, tmp_path / "bare.pth")
    save_file(tensors, tmp_path / "tensors.safetensors")
    sources: list[Any] = [
        tensors,
        {"model": tensors, "epoch": 3},
        {"state_dict": tensors},
        tmp_path / "run.pth",
        str(tmp_path / "bare.pth"),
        tmp_path / "tensors.safetensors",
    ]
    for source in sources:
        loaded = save_official(load_official("mae_vit", source, **HEADS["mae_vit"]), "mae_vit")
        assert all(loaded[key].equal(tensors[key]) for key in tensors)


def test_norm_pix_loss_is_given_or_the_checkpoints_or_the_papers() -> None:
    tensors = save_official(small("mae_vit"), "mae_vit")
    container = {"model": tensors, "args": argparse.Namespace(norm_pix_loss=False)}
    cases: list[tuple[Any, dict[str, bool], bool]] = [
        (tensors, {}, True),
        (container, {}, False),
        (container, {"norm_pix_loss": True}, True),
    ]
    for source, given, expected in cases:
        model: Any = load_official("mae_vit", source, **given, **HEADS["mae_vit"])
        assert model.norm_pix_loss is expected


def test_the_callers_tensors_are_copied() -> None:
    tensors = save_official(small("mae_vit"), "mae_vit")
    before = tensors["cls_token"].clone()
    model = load_official("mae_vit", tensors, **HEADS["mae_vit"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert tensors["cls_token"].equal(before)


def test_position_tables_come_from_the_checkpoint() -> None:
    tensors = dict(save_official(small("mae_vit"), "mae_vit"))
    tensors["pos_embed"] = torch.randn_like(tensors["pos_embed"])
    tensors["decoder_pos_embed"] = torch.randn_like(tensors["decoder_pos_embed"])
    state = load_official("mae_vit", tensors, **HEADS["mae_vit"]).state_dict()
    assert state["encoder.pos_embed"].equal(tensors["pos_embed"])
    assert state["decoder.pos_embed"].equal(tensors["decoder_pos_embed"])


def test_sizes_in_any_spelling() -> None:
    spelled: dict[str, list[dict[str, Any]]] = {
        "mae_vit": [
            {"img_size": 32, "patch_size": 8, "embed_dim": 36, "depth": 3, "mlp_ratio": 2},
            {"img_size": (32, 32), "depths": (3,), "mlp_ratios": 2.0, "decoder_embed_dim": 24},
        ],
        "um_mae_swin": [
            {"embed_dims": (8, 16, 32, 64), "depths": [1, 2, 3, 2], "num_heads": (1, 2, 4, 8)},
            {"embed_dim": 8, "num_heads": 1, "patch_size": 16, "vis_mask_ratio": 0.25, "posmlp_dim": 6},
            {"window_size": (4, 4, 4, 2), "img_size": 128, "mlp_ratios": (2, 2, 2, 2), "patch_size": 4},
        ],
    }
    for family, choices in spelled.items():
        model = small(family)
        for sizes in choices:
            loaded = load_official(family, save_official(model, family), **{**HEADS[family], **sizes})
            assert loss_of(loaded, family) == loss_of(model, family)


def test_secondary_masking_follows_the_checkpoint() -> None:
    tensors = dict(save_official(small("um_mae_swin"), "um_mae_swin"))
    del tensors["vis_mask_token"]
    model = load_official("um_mae_swin", tensors, vis_mask_ratio=0, **HEADS["um_mae_swin"])
    assert not [name for name, _ in model.named_parameters() if "vis_mask_token" in name]
    assert list(save_official(model, "um_mae_swin")) == list(tensors)


def test_heads_of_the_published_sizes_are_known() -> None:
    with torch.device("meta"):
        for width, depth, heads in ((768, 12, 12), (1024, 24, 16), (1280, 32, 16)):
            config = mae.Config(ViTConfig(embed_dim=width, depth=1, num_heads=heads), DecoderConfig(depth=1))
            tensors = save_official(mae.MAE(224, config), "mae_vit")
            model: Any = load_official("mae_vit", tensors)
            assert model.encoder.config.num_heads == heads, depth
            assert model.decoder.blocks[0].attn.num_heads == 16


@pytest.mark.parametrize(
    ("family", "change", "sizes", "message"),
    [
        ("mae_vit", {"norm.weight": None}, {}, "missing keys: norm.weight"),
        ("mae_vit", {"head.weight": torch.ones(2)}, {}, "left-over keys: head.weight"),
        ("mae_vit", {"norm.bias": torch.ones(7)}, {}, r"norm.bias \(7,\) instead of \(36,\)"),
        ("mae_vit", {}, {"depth": 2}, "left-over keys: blocks.2.norm1.weight"),
        ("mae_vit", {}, {"decoder_depth": 3}, "missing keys: decoder_blocks.2"),
        ("mae_vit", {}, {"img_size": 64}, r"pos_embed \(1, 17, 36\) instead of \(1, 65, 36\)"),
        ("mae_vit", {}, {"num_heads": 5}, "num_heads: 5 heads do not divide the width 36"),
        ("mae_vit", {}, {"window_size": 8}, "mae_vit has no size window_size; its sizes are: img_size"),
        ("mae_vit", {}, {"depth": (3, 4)}, r"depth = \(3, 4\) must be one number"),
        ("um_mae_swin", {}, {"vis_mask_ratio": 0}, "left-over keys: vis_mask_token"),
        ("um_mae_swin", {"vis_mask_token": None}, {"vis_mask_ratio": 0.25}, "missing keys: vis_mask_token"),
        ("um_mae_swin", {}, {"depths": (1, 3, 2, 2)}, "missing keys: blocks.4.downsample"),
        ("um_mae_swin", {}, {"depths": (1, 2, 3)}, "four stages"),
        ("um_mae_swin", {}, {"embed_dims": (8, 16, 32, 48)}, "must double"),
        ("um_mae_swin", {}, {"patch_size": 8}, "patch_size is 4"),
        ("um_mae_swin", {}, {"window_size": 5}, "window_size: a window of 5 does not divide"),
        ("um_mae_swin", {}, {"window_size": (4, 2, 4, 2)}, "must be one number: stages differ only"),
        ("um_mae_swin", {"blocks.1.downsample.": None}, {}, "downsample of three blocks"),
        ("um_mae_swin", {"pr_dwconv.bias": torch.ones(24)}, {}, "missing keys: pr_dwconv.weight"),
    ],
)
def test_keys_and_sizes_that_do_not_fit_are_named(
    family: str, change: dict[str, Tensor | None], sizes: dict[str, Any], message: str
) -> None:
    tensors = dict(save_official(small(family), family))
    for key, value in change.items():
        if value is None:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(key)}
        else:
            tensors[key] = value
    with pytest.raises(ValueError, match=message):
        load_official(family, tensors, **{**HEADS[family], **sizes})


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"cls_token": torch.ones(1, 1, 4)}, "config": Path("x")}, tmp_path / "unsafe.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    torch.save({"model": {}}, tmp_path / "empty.pth")
    torch.save({"weights": {"cls_token": torch.ones(1)}}, tmp_path / "elsewhere.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "nothing.pth").touch()
    whole = (tmp_path / "list.pth").read_bytes()
    (tmp_path / "torn.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    cases = {
        "unsafe.pth": "cannot be read as a checkpoint",
        "list.pth": "holds a list",
        "empty.pth": "empty state dict",
        "elsewhere.pth": "bare or under model or state_dict: weights",
        "text.pth": "cannot be read",
        "nothing.pth": "cannot be read",
        "torn.pth": "cannot be read",
        "torn.safetensors": "cannot be read",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            load_official("mae_vit", tmp_path / name)
        assert name in str(error.value)
    with pytest.raises(FileNotFoundError):
        load_official("mae_vit", tmp_path / "nowhere.pth")


def test_an_encoder_only_file_names_the_decoders_keys() -> None:
    tensors = {k: v for k, v in save_official(small("mae_vit"), "mae_vit").items() if "decoder" not in k}
    with pytest.raises(ValueError, match="missing keys: decoder_pos_embed, decoder_embed.weight"):
        load_official("mae_vit", tensors, **HEADS["mae_vit"])


def test_families_that_are_not_there_are_refused() -> None:
    for family in ("simmim", "mae", ""):
        with pytest.raises(ValueError, match="supported are: mae_vit, "):
            load_official(family, {})
    with pytest.raises(ValueError, match="um_mae_swin is another model than this MAE on ViT"):
        save_official(small("mae_vit"), "um_mae_swin")


def test_partial_reconstruction_has_names_of_its_own() -> None:
    model = small("mae_vit", throwing=True)
    saved = save_official(model, "mae_vit")
    assert list(saved)[-2:] == list(PR_KEYS)
    assert saved["pr_dwconv.weight"].shape == (24, 1, 5, 5)
    loaded = load_official("mae_vit", saved, **HEADS["mae_vit"])
    assert loss_of(loaded, "mae_vit", 0.5) == loss_of(model, "mae_vit", 0.5)


def test_the_formulas_weights_fill_a_full_size_model() -> None:
    tensors = weights({key: shape for key, shape in KEYS["um_mae_swin"].items() if "blocks" not in key})
    assert tensors["decoder_embed.weight"].dtype == torch.float64
    assert tensors["norm.weight"].sub(1).abs().max() <= 0.1
