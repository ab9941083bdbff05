"""SimMIM in the official formats, and full-size ones in float64 against the official code's numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interop.fixtures import KEYS, images, noise, weights
from ummim.backbones.pvt import PVTConfig
from ummim.backbones.relative_vit import RelativeViTConfig
from ummim.backbones.swin import SwinConfig
from ummim.backbones.table_swin import TableSwinConfig
from ummim.interop import load_official, save_official
from ummim.interop.families.simmim import FAMILIES
from ummim.interop.official import family_of, official_names
from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.methods.simmim import Config, SimMIM
from ummim.nn.aggregation import PartialConfig

FULL: dict[str, tuple[Config, int]] = {
    "simmim_vit": (Config(RelativeViTConfig()), 224),
    "simmim_swin": (Config(TableSwinConfig(window_size=6)), 192),
    "um_simmim_swin": (Config(SwinConfig(window_size=16)), 256),
    "um_simmim_pvt": (Config(PVTConfig(sr_ratios=(8, 4, 2, 1))), 256),
}
SMALL: dict[str, tuple[Config, int]] = {
    "simmim_vit": (Config(RelativeViTConfig(8, 24, 3, 3, 2.0, drop_path=0.0)), 48),
    "simmim_swin": (Config(TableSwinConfig(8, (2, 1, 3, 2), (1, 2, 2, 4), 4, 2.0)), 128),
    "um_simmim_swin": (Config(SwinConfig(8, (1, 2, 3, 2), (1, 2, 2, 4), 4, 2.0, 6)), 64),
    "um_simmim_pvt": (
        Config(PVTConfig((8, 12, 16, 24), (1, 2, 3, 1), (1, 2, 4, 3), (2.0, 3.0, 2.0, 2.0), (2, 4, 2, 1))),
        64,
    ),
}
SIZES: dict[str, dict[str, Any]] = {  # what the tensors do not tell
    "simmim_vit": {},
    "simmim_swin": {},
    "um_simmim_swin": {"img_size": 64, "window_size": 4},
    "um_simmim_pvt": {"num_heads": (1, 2, 4, 3), "sr_ratios": (2, 4, 2, 1)},
}


def fixed(key: str) -> bool:
    """True for the keys of indices and masks."""
    return key.endswith((".relative_position_index", ".attn_mask"))


def official_weights(family: str) -> dict[str, Tensor]:
    """The formula's parameters, and the indices and masks that belong to them."""
    config, image_size = FULL[family]
    with torch.device("meta"):
        model = SimMIM(image_size, config).double()
    shapes = {key: shape for key, shape in KEYS[family].items() if not fixed(key)}
    return {**weights(shapes), **FAMILIES[family].constants(model)}


def mask_of(tokens: int, masked: int) -> Tensor:
    """(2, tokens) bool: the first of the ascending noise are masked."""
    return torch.zeros(2, tokens, dtype=torch.bool).scatter(1, noise(tokens).argsort(1)[:, :masked], True)


MASKS = {
    "simmim_vit": mask_of(49, 30).view(2, 7, 7).repeat_interleave(2, 1).repeat_interleave(2, 2),
    "simmim_swin": mask_of(36, 22),
    "um_simmim_swin": mask_of(256, 192),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "loss", "patch", "every"),
    [
        ("simmim_vit", 1.0376600968, 3.27827417e-01, 2.20121970),
        ("simmim_swin", 0.9947801958, 2.05293512e-02, 1.24429784),
        ("um_simmim_swin", 0.9996068522, 3.59317169e-02, 1.16386041),
    ],
)
def test_full_size_models_compute_the_official_numbers(family: str, loss: float, patch: float, every: float) -> None:
    model = load_official(family, official_weights(family))
    output = model(images(FULL[family][1]), MaskPlan.from_mask(MASKS[family]))
    assert output.loss.item() == pytest.approx(loss, abs=6e-11)
    output.loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {key: parameters[ours].grad for key, ours in official_names(model, family).items()}
    assert all(gradient is not None for gradient in gradients.values())
    norms = {key: gradient.norm() for key, gradient in gradients.items() if gradient is not None}
    (first,) = (norm for key, norm in norms.items() if key.endswith("patch_embed.proj.weight"))
    assert first.item() == pytest.approx(patch, rel=5e-9)
    assert torch.stack(list(norms.values())).norm().item() == pytest.approx(every, rel=5e-9)


@pytest.mark.parametrize("family", FULL)
def test_names_order_and_shapes_are_the_official_ones(family: str) -> None:
    config, image_size = FULL[family]
    with torch.device("meta"):
        model = SimMIM(image_size, config)
    saved = save_official(model, family)
    assert {key: list(tensor.shape) for key, tensor in saved.items()} == KEYS[family]
    order = [key for key in saved if not fixed(key)]
    assert order == [key for key in KEYS[family] if not fixed(key)]
    assert family_of(model) == family


def small(family: str, throwing: bool = False) -> SimMIM:
    torch.manual_seed(0)
    config, image_size = SMALL[family]
    model = SimMIM(image_size, config, PartialConfig(kernel_size=5), throwing)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def loss_of(model: Any, throw: float = 0.0) -> Tensor:
    sampler = PlanSampler(model.grid, MaskConfig(), throw)
    plan = sampler.stack([sampler(seed) for seed in range(2)])
    side = model.grid[0] * model.patch_size
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    return model(images.to(model.encoder.mask_token.dtype), plan).loss


@pytest.mark.parametrize(("family", "throwing"), [*((family, False) for family in SMALL), ("simmim_vit", True)])
def test_saving_inverts_loading_and_the_loss_stays(family: str, throwing: bool) -> None:
    model = small(family, throwing)
    first = save_official(model, family)
    loaded = load_official(family, first, **SIZES[family])
    assert loss_of(loaded, 0.4 * throwing) == loss_of(model, 0.4 * throwing)
    again = save_official(loaded, family)
    assert list(again) == list(first)
    for key, tensor in first.items():
        assert again[key].dtype == tensor.dtype
        assert again[key].numpy().tobytes() == tensor.numpy().tobytes(), key
    assert ("pr_dwconv.weight" in first) is throwing


@pytest.mark.parametrize("family", SMALL)
def test_float64_in_and_out(family: str) -> None:
    """Official buffers follow the model's dtype; indices stay integers."""
    saved = save_official(small(family).double(), family)
    loaded = load_official(family, saved, **SIZES[family])
    assert loss_of(loaded).dtype == torch.float64
    for key, tensor in save_official(loaded, family).items():
        assert tensor.dtype == (torch.int64 if key.endswith("index") else torch.float64)
        assert tensor.equal(saved[key])


def test_fixed_tensors_are_checked() -> None:
    for family, key in (
        ("simmim_vit", "encoder.rel_pos_bias.relative_position_index"),
        ("simmim_swin", "encoder.layers.2.blocks.0.attn.relative_position_index"),
        ("simmim_swin", "encoder.layers.0.blocks.1.attn_mask"),
    ):
        tensors = save_official(small(family), family)
        with pytest.raises(ValueError, match=f"fixed tensors differ: {key}"):
            load_official(family, {**tensors, key: tensors[key] + 1})


def test_drop_path_is_off_in_a_loaded_model() -> None:
    """No checkpoint tells its rate, and the official numbers are without."""
    model: Any = load_official("simmim_vit", save_official(small("simmim_vit"), "simmim_vit"))
    assert model.training
    assert loss_of(model) == loss_of(model)


def test_sizes_are_read_off_the_tensors_or_given() -> None:
    model: Any = load_official("simmim_swin", save_official(small("simmim_swin"), "simmim_swin"))
    assert (model.encoder.image_size, model.encoder.config.window_size) == (128, 4)
    given = {"img_size": 128, "patch_size": 32, "embed_dims": (8, 16, 32, 64), "depths": (2, 1, 3, 2), "window_size": 4}
    model = load_official("simmim_swin", save_official(small("simmim_swin"), "simmim_swin"), **given)
    assert model.norm_pix_loss is False
    model = load_official("simmim_vit", save_official(small("simmim_vit"), "simmim_vit"), norm_pix_loss=True)
    assert (model.grid, model.encoder.config.num_heads, model.norm_pix_loss) == ((6, 6), 3, True)
    model = load_official(
        "um_simmim_pvt", save_official(small("um_simmim_pvt"), "um_simmim_pvt"), **SIZES["um_simmim_pvt"]
    )
    assert model.grid == (4, 4)


@pytest.mark.parametrize(
    ("family", "change", "sizes", "message"),
    [
        ("simmim_vit", {"encoder.norm.weight": None}, {}, "missing keys: encoder.norm.weight"),
        ("simmim_vit", {"encoder.pos_embed": torch.ones(1)}, {}, "left-over keys: encoder.pos_embed"),
        ("simmim_vit", {}, {"img_size": 64}, "relative_position_bias_table"),
        ("simmim_vit", {}, {"window_size": 7}, "simmim_vit has no size window_size"),
        ("simmim_swin", {}, {"window_size": 2}, "relative_position_bias_table"),
        ("simmim_swin", {}, {"patch_size": 16}, "patch_size is 4"),
        ("simmim_swin", {}, {"embed_dims": (8, 16, 32, 48)}, "must double"),
        ("simmim_swin", {"pr_dwconv.weight": torch.ones(1)}, {}, "left-over keys: pr_dwconv.weight"),
        ("um_simmim_swin", {}, {"img_size": 96, "window_size": 5}, "window_size: a window of 5"),
        ("um_simmim_pvt", {}, {"sr_ratios": (3, 1, 1, 1)}, "sr_ratios: squares of 3"),
    ],
)
def test_keys_and_sizes_that_do_not_fit_are_named(
    family: str, change: dict[str, Tensor | None], sizes: dict[str, Any], message: str
) -> None:
    tensors = {**save_official(small(family), family), **change}
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        load_official(family, kept, **{**SIZES[family], **sizes})


def test_each_model_has_one_family() -> None:
    for family in SMALL:
        assert family_of(small(family)) == family
        for other in SMALL.keys() - {family}:
            with pytest.raises(ValueError, match=f"{other} is another model"):
                save_official(small(family), other)
