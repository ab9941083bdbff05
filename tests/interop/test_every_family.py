"""Small random checkpoints of every family, written from the official key lists alone: what is loaded computes what a
plain reading of the official tensors does, and is saved as it came.
"""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.interop.fixtures import KEYS
from tests.interop.official_cases import CASES, Case
from tests.interop.official_tensors import keys_of, official_tensors
from tests.interop.plain_official import reference
from ummim.interop import load_official, save_official
from ummim.interop.official import FAMILIES, family_of, official_names
from ummim.masking import MaskPlan

FIRST = [next(case for case in CASES if case.family == family) for family in FAMILIES]
WITHOUT_PARTIAL = ("simmim_swin", "um_simmim_swin", "um_simmim_pvt")  # they need every token of the map
PLURALS = {"embed_dim": "embed_dims", "depth": "depths", "mlp_ratio": "mlp_ratios"}


def name_of(case: Case) -> str:
    return f"{case.family}-{case.sizes['img_size']}"


def untold(case: Case) -> dict[str, Any]:
    return {name: case.sizes[name] for name in case.untold}


def masks(case: Case, throwing: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(2, N) bool: masked, secondary and thrown."""
    generator = torch.Generator().manual_seed(5)
    unit = 32 if case.family in ("simmim_swin", "green_mim_swin", "local_mim_swin") else 16
    side = case.sizes["img_size"] // case.sizes.get("patch_size", unit)
    masked = torch.ones(2, side, side, dtype=torch.bool)
    if case.family.startswith("um_mae"):
        for b in range(2):
            for i in range(side // 2):
                for j in range(side // 2):
                    at = int(torch.randint(4, (1,), generator=generator))
                    masked[b, 2 * i + at // 2, 2 * j + at % 2] = False
    else:
        draws = torch.rand(2, side * side, generator=generator)
        draws = draws[:1].expand(2, -1) if unit == 32 else draws  # one mask for a batch
        masked = masked.flatten(1).scatter(1, draws.argsort(1)[:, : max(1, side * side // 4)], False)
    masked = masked.flatten(1)
    secondary, thrown = torch.zeros_like(masked), torch.zeros_like(masked)
    for b in range(2):
        if case.sizes.get("vis_mask_ratio"):
            visible = (~masked[b]).nonzero()[:, 0]
            secondary[b, visible[torch.randperm(len(visible), generator=generator)[: max(1, len(visible) // 4)]]] = True
        if throwing:
            hidden = masked[b].nonzero()[:, 0]
            thrown[b, hidden[torch.randperm(len(hidden), generator=generator)[: len(hidden) // 2]]] = True
    return masked, secondary, thrown


@pytest.mark.parametrize(
    ("case", "throwing"),
    [(case, i % 2 == 1 and case.family not in WITHOUT_PARTIAL) for i, case in enumerate(CASES)],
    ids=lambda value: name_of(value) if isinstance(value, Case) else "throwing" if value else "whole",
)
def test_loss_predictions_and_gradients_are_those_of_the_official_tensors(case: Case, throwing: bool) -> None:
    tensors = official_tensors(case, throwing, hog_bias=not throwing)
    leaves = {
        key: tensor.double().requires_grad_() if tensor.is_floating_point() else tensor
        for key, tensor in tensors.items()
    }
    masked, secondary, thrown = masks(case, throwing)
    side = case.sizes["img_size"]
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    loss, prediction = reference(case.family, leaves, case.sizes, pixels, masked, secondary, thrown)
    loss.backward()
    model = load_official(case.family, tensors, **untold(case))
    plan = MaskPlan.from_mask(masked, secondary, thrown)
    single = model(pixels.float(), plan)
    assert single.loss.item() == pytest.approx(loss.item(), rel=2e-5)
    torch.testing.assert_close(single.prediction[masked].double(), prediction[masked], rtol=1e-3, atol=1e-4)
    output = model.double()(pixels, plan)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-8)  # SimMIM's count of pixels is a float32
    torch.testing.assert_close(output.prediction[masked], prediction[masked], rtol=1e-9, atol=1e-9)
    parameters = dict(model.named_parameters())
    for official, ours in official_names(model, case.family).items():
        if ours in parameters:
            grad = parameters[ours].grad
            assert grad is not None, official
            expected = leaves[official].grad
            assert expected is not None, official
            torch.testing.assert_close(grad.view(expected.shape), expected, rtol=1e-6, atol=1e-11, msg=official)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_sizes_given_in_every_spelling_and_sizes_read_make_one_model(case: Case) -> None:
    tensors = official_tensors(case)
    plural = {PLURALS.get(name, name): value for name, value in case.sizes.items()}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in plural.items()}
    listed["img_size"] = (case.sizes["img_size"],) * 2
    if "patch_size" not in listed:
        listed["patch_size"] = 4
    built = [str(load_official(case.family, tensors, **sizes)) for sizes in (case.sizes, listed, untold(case))]
    assert built[0] == built[1] == built[2]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_what_is_saved_is_what_was_loaded_in_its_order(case: Case) -> None:
    tensors = official_tensors(case, pr=case.family not in WITHOUT_PARTIAL)
    model = load_official(case.family, tensors, **untold(case))
    assert family_of(model) == case.family
    saved = save_official(model, case.family)
    assert list(saved) == list(tensors)
    for key, tensor in tensors.items():
        assert saved[key].dtype == tensor.dtype
        assert saved[key].shape == tensor.shape
        assert saved[key].numpy().tobytes() == tensor.numpy().tobytes(), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", FIRST, ids=name_of)
def test_other_precisions_and_layouts_come_back_as_values(case: Case, dtype: torch.dtype) -> None:
    """Of any strides, and of a parameter's or a plain tensor's kind; indices that were cast along are still indices."""
    tensors: dict[str, Tensor] = {}
    for i, (key, tensor) in enumerate(official_tensors(case).items()):
        cast = tensor.to(dtype)
        strided = torch.stack([cast, cast], dim=-1)[..., 0]
        turned = cast.transpose(0, -1).contiguous().transpose(0, -1)
        tensors[key] = (strided, turned, torch.nn.Parameter(cast), cast)[i % 4]
    model = load_official(case.family, tensors, **untold(case))
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
    for key, tensor in save_official(model, case.family).items():
        assert tensor.dtype == (torch.int64 if key.endswith("index") else dtype)
        assert tensor.to(dtype).equal(tensors[key]), key


@pytest.mark.parametrize("case", FIRST, ids=name_of)
def test_every_container_holds_the_same_model(case: Case, tmp_path: Path) -> None:
    tensors = official_tensors(case)
    run = {"model": tensors, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}
    torch.save(run, tmp_path / "run.pth")
    torch.save(tensors, tmp_path / "bare.pth")
    torch.save({"meta": {"epoch": 3}, "state_dict": tensors}, tmp_path / "wrapped.pth")
    save_file(tensors, tmp_path / "tensors.safetensors")
    files = [path if i % 2 else str(path) for i, path in enumerate(sorted(tmp_path.iterdir()))]
    for source in (run, {"state_dict": tensors}, *files):
        saved = save_official(load_official(case.family, source, **untold(case)), case.family)
        assert list(saved) == list(tensors)
        assert all(saved[key].equal(tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("case", FIRST, ids=name_of)
def test_norm_pix_loss_is_given_or_the_runs_or_the_published(case: Case) -> None:
    tensors, sizes = official_tensors(case), untold(case)
    published = FAMILIES[case.family].norm_pix
    for expected in (True, False):
        assert load_official(case.family, tensors, **sizes, norm_pix_loss=expected).norm_pix_loss is expected
        run = {"model": tensors, "args": argparse.Namespace(norm_pix_loss=expected)}
        assert load_official(case.family, run, **sizes).norm_pix_loss is expected
    assert load_official(case.family, tensors, **sizes).norm_pix_loss is published


def test_a_swins_image_is_read_off_masks_and_late_windows() -> None:
    """Microsoft's Swin has no position table; where nothing tells, the last stage is one window."""
    swin = {"embed_dim": 8, "num_heads": (1, 2, 2, 4), "mlp_ratio": 2.0}
    for depth, side, window, read in (
        ((2, 1, 1, 1), 192, 6, 192),  # masks of the first stage
        ((1, 1, 2, 1), 256, 4, 256),  # of a later one only
        ((1, 1, 1, 1), 64, 4, 64),  # a last stage smaller than the window
        ((1, 1, 1, 1), 224, 7, 224),  # nothing
        ((1, 1, 1, 1), 448, 7, 224),  # nothing, and another image
    ):
        case = Case("simmim_swin", {**swin, "depth": depth, "img_size": side, "window_size": window}, ())
        model: Any = load_official("simmim_swin", official_tensors(case))
        assert (model.encoder.image_size, model.encoder.config.window_size) == (read, window)


def test_mff_of_as_many_weights_as_blocks_fuses_them_all() -> None:
    case = next(case for case in CASES if case.family == "mff_vit" and case.sizes["depth"] == 4)
    assert load_official("mff_vit", official_tensors(case), num_heads=5, decoder_num_heads=3).taps == (0, 1, 2, 3)


def test_the_checkpoints_here_have_the_official_keys_in_the_official_order() -> None:
    """At full size, against the lists that were taken from official models."""
    heads = {"decoder_embed_dim": 512, "decoder_depth": 2, "mlp_ratio": 4.0}
    vit = {**heads, "img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    tiny = {**heads, "img_size": 256, "embed_dim": 96, "depth": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
    base = {**heads, "embed_dim": 128, "depth": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "decoder_depth": 1}
    pvt = {**heads, "img_size": 256, "embed_dim": (64, 128, 320, 512), "depth": (3, 4, 6, 3), "mlp_ratio": (8, 8, 4, 4)}
    for family, sizes in (
        ("mae_vit", {**vit, "decoder_depth": 8}),
        ("um_mae_vit", {**vit, "vis_mask_ratio": 0.25}),
        ("um_mae_swin", {**tiny, "posmlp_dim": 32, "vis_mask_ratio": 0.25}),
        ("um_mae_pvt", {**pvt, "vis_mask_ratio": 0.25}),
        ("um_simmim_swin", {**tiny, "posmlp_dim": 32}),
        ("um_simmim_pvt", pvt),
        ("simmim_vit", vit),
        ("simmim_swin", {**base, "img_size": 192, "window_size": 6}),
        ("green_mim_swin", {**base, "img_size": 224, "window_size": 7}),
    ):
        keys = keys_of(Case(family, sizes, ()), False, False)
        listed = [(key, list(value.shape if isinstance(value, Tensor) else value)) for key, value in keys]
        assert listed == list(KEYS[family].items()), family
