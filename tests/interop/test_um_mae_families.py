"""UM-MAE's official checkpoints on ViT and PVT, in and out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interop.fixtures import KEYS, PR_KEYS
from ummim.backbones.pvt import PVTConfig
from ummim.backbones.swin import SwinConfig
from ummim.backbones.vit import ViTConfig
from ummim.interop import load_official, save_official
from ummim.interop.official import family_of
from ummim.masking import MaskConfig, PlanSampler
from ummim.methods.um_mae import UMMAE, Config
from ummim.nn.aggregation import PartialConfig
from ummim.nn.decoder import DecoderConfig

DECODER = DecoderConfig(embed_dim=24, depth=2, num_heads=4)
VIT = ViTConfig(patch_size=8, embed_dim=36, depth=3, num_heads=3, mlp_ratio=2.0)
SWIN = SwinConfig(8, (1, 2, 3, 2), (1, 2, 4, 8), window_size=4, pos_mlp_dim=6)
PVT = PVTConfig((8, 12, 16, 24), (1, 2, 3, 1), (1, 2, 4, 3), (2.0, 3.0, 2.0, 2.0), (2, 4, 2, 1))
ENCODERS: dict[str, ViTConfig | SwinConfig | PVTConfig] = {"um_mae_vit": VIT, "um_mae_swin": SWIN, "um_mae_pvt": PVT}
SIZES: dict[str, dict[str, Any]] = {  # what tensors do not tell
    "um_mae_vit": {"num_heads": 3, "decoder_num_heads": 4},
    "um_mae_swin": {"window_size": 4, "decoder_num_heads": 4},
    "um_mae_pvt": {"num_heads": (1, 2, 4, 3), "sr_ratios": (2, 4, 2, 1), "decoder_num_heads": 4},
}
NEW = ("um_mae_vit", "um_mae_pvt")  # um_mae_swin is in test_official.py


def small(family: str, throwing: bool = False, secondary: bool = True) -> UMMAE:
    torch.manual_seed(0)
    config = Config(ENCODERS[family], DECODER, legacy_decoder_order=family != "um_mae_vit")
    side = 32 if family == "um_mae_vit" else 128
    return UMMAE(side, config, PartialConfig(kernel_size=5), throwing, secondary)


def loss_of(model: Any, throw: float = 0.0) -> Tensor:
    sampler = PlanSampler(model.grid, MaskConfig("uniform", 0.75, 0.25), throw)
    plan = sampler.stack([sampler(seed) for seed in range(2)])
    side = model.grid[0] * model.patch_size
    return model(torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)), plan).loss


@pytest.mark.parametrize("family", NEW)
def test_names_order_and_shapes_are_the_official_ones(family: str) -> None:
    with torch.device("meta"):
        model = UMMAE(224, Config(ViTConfig())) if family == "um_mae_vit" else UMMAE(256, Config(PVTConfig()))
    saved = save_official(model, family)
    assert {key: list(tensor.shape) for key, tensor in saved.items()} == KEYS[family]
    assert list(saved) == list(KEYS[family])


@pytest.mark.parametrize("secondary", [False, True])
@pytest.mark.parametrize("throwing", [False, True])
@pytest.mark.parametrize("family", NEW)
def test_saving_inverts_loading_and_the_loss_stays(family: str, throwing: bool, secondary: bool) -> None:
    model = small(family, throwing, secondary)
    first = save_official(model, family)
    assert ("vis_mask_token" in first, set(PR_KEYS) <= set(first)) == (secondary, throwing)
    loaded = load_official(family, first, **SIZES[family])
    again = save_official(loaded, family)
    assert list(again) == list(first)
    for key, tensor in first.items():
        assert again[key].numpy().tobytes() == tensor.numpy().tobytes(), key
    throw = 0.5 if throwing else 0.0
    assert loss_of(loaded, throw) == loss_of(model, throw)
    loss_of(loaded, throw).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if parameter.grad is not None} == trained
    assert loss_of(loaded.double().half().double(), throw).isfinite()


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("um_mae_vit", {"vis_mask_ratio": 0}, "left-over keys: vis_mask_token"),
        ("um_mae_vit", {"window_size": 8}, "um_mae_vit has no size window_size"),
        ("um_mae_vit", {"depth": 2}, "left-over keys: blocks.2.norm1.weight"),
        (
            "um_mae_pvt",
            {"sr_ratios": (3, 2, 1, 1)},
            "sr_ratios: squares of 3 do not divide the 16x16 tokens",
        ),
        ("um_mae_pvt", {"sr_ratios": (4, 2, 1)}, "four stages"),
        (
            "um_mae_pvt",
            {"embed_dims": (6, 12, 16, 24)},
            "embed_dims: the position table needs .* multiple of 4",
        ),
        ("um_mae_pvt", {"depths": (1, 3, 2, 1)}, "missing keys: blocks.4.downsample"),
        ("um_mae_pvt", {"num_heads": (1, 2, 4, 5)}, "num_heads: 5 heads do not divide the width 24"),
        ("um_mae_pvt", {"mlp_ratios": (2, 2, 2, 2)}, r"fc1.weight \(36, 12\) instead of \(24, 12\)"),
        ("um_mae_pvt", {"posmlp_dim": 32}, "um_mae_pvt has no size posmlp_dim"),
        ("um_mae_pvt", {"patch_size": 8}, "patch_size is 4"),
    ],
)
def test_sizes_that_do_not_fit_are_named(family: str, sizes: dict[str, Any], message: str) -> None:
    tensors = save_official(small(family), family)
    with pytest.raises(ValueError, match=message):
        load_official(family, tensors, **{**SIZES[family], **sizes})


def test_sizes_in_any_spelling() -> None:
    choices: dict[str, list[dict[str, Any]]] = {
        "um_mae_vit": [{"img_size": 32, "patch_size": 8, "embed_dim": 36, "depth": 3, "vis_mask_ratio": 0.25}],
        "um_mae_pvt": [
            {"img_size": 128, "patch_size": 4, "embed_dims": [8, 12, 16, 24], "depths": [1, 2, 3, 1]},
            {"patch_size": 16, "embed_dim": (8, 12, 16, 24), "mlp_ratios": (2, 3, 2, 2), "decoder_depth": 2},
            {"norm_pix_loss": True, "decoder_embed_dim": 24, "vis_mask_ratio": 0.5},
        ],
    }  # fmt: skip
    for family, spelled in choices.items():
        model = small(family)
        for sizes in spelled:
            loaded = load_official(family, save_official(model, family), **{**SIZES[family], **sizes})
            assert loss_of(loaded) == loss_of(model)


def test_models_of_other_families_are_refused() -> None:
    for family in SIZES:
        model = small(family)
        assert family_of(model) == family
        for other in SIZES.keys() - {family}:
            with pytest.raises(ValueError, match=f"{other} is another model"):
                save_official(model, other)


def test_the_importer_sets_the_legacy_order_of_pyramids_only() -> None:
    for family in SIZES:
        model: Any = load_official(family, save_official(small(family), family), **SIZES[family])
        assert model.legacy_decoder_order is (family != "um_mae_vit")
