"""Full-size models in float64 against the numbers of the official code (docs/fidelity.md).

The PR-MIM rows and the mended order are not official: they come from a reference that others wrote.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.interop.fixtures import KEYS, PR_KEYS, images, random_mask, uniform_mask, weights
from ummim.interop import load_official
from ummim.interop.official import official_names
from ummim.masking import MaskPlan, furthest_sample
from ummim.methods.api import MIMOutput


def run(model: nn.Module, family: str, plan: MaskPlan, side: int) -> tuple[MIMOutput, float, float]:
    """Output, and the norms of the gradients of the patch embedding and of all parameters."""
    output = model(images(side), plan)
    output.loss.backward()
    parameters = dict(model.named_parameters())
    grads: dict[str, Tensor] = {}
    for official, ours in official_names(model, family).items():
        if ours in parameters:
            grad = parameters[ours].grad
            assert grad is not None, official
            grads[official] = grad
    patch = grads["patch_embed.proj.weight"].norm().item()
    return output, patch, torch.stack([grad.norm() for grad in grads.values()]).norm().item()


def close(expected: float) -> object:
    """Equal to the digits given: ten for losses, nine for gradients."""
    return pytest.approx(expected, rel=3e-9, abs=0)


def test_mae_with_normalised_pixels() -> None:
    masked = random_mask()
    assert masked[0, :12].int().tolist() == [1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1]
    model = load_official("mae_vit", weights(KEYS["mae_vit"]))
    output, patch, every = run(model, "mae_vit", MaskPlan.from_mask(masked), 224)
    assert output.loss.item() == pytest.approx(2.0321559031, abs=6e-11)
    assert (patch, every) == (close(3.49369829e-01), close(5.60612022))
    expected = [0.8845585626, -2.4207159394, -0.7550017952]
    assert output.prediction[0, 0, :3].tolist() == pytest.approx(expected, abs=6e-11)


def test_mae_with_raw_pixels() -> None:
    model = load_official("mae_vit", weights(KEYS["mae_vit"]), norm_pix_loss=False)
    output, patch, every = run(model, "mae_vit", MaskPlan.from_mask(random_mask()), 224)
    assert output.loss.item() == pytest.approx(1.5893864124, abs=6e-11)
    assert (patch, every) == (close(3.55475589e-01), close(5.68055044))


def test_um_mae_without_secondary_masking() -> None:
    keys = {name: shape for name, shape in KEYS["um_mae_swin"].items() if name != "vis_mask_token"}
    model = load_official("um_mae_swin", weights(keys))
    output, patch, every = run(model, "um_mae_swin", MaskPlan.from_mask(uniform_mask()[0]), 256)
    assert output.loss.item() == pytest.approx(1.9573837727, abs=6e-11)
    assert (patch, every) == (close(7.89899168e-02), close(3.80093206))


def test_um_mae_with_secondary_masking_in_the_official_and_the_mended_order() -> None:
    model: Any = load_official("um_mae_swin", weights(KEYS["um_mae_swin"]))
    plan = MaskPlan.from_mask(*uniform_mask())
    output, patch, every = run(model, "um_mae_swin", plan, 256)
    assert output.loss.item() == pytest.approx(1.9662558816, abs=6e-11)
    assert (patch, every) == (close(5.99278947e-02), close(3.83852753))
    assert model.legacy_decoder_order is True
    model.legacy_decoder_order = False
    with torch.no_grad():
        assert model(images(256), plan).loss.item() == pytest.approx(1.9660842800, abs=6e-11)


KEPT_HALF = [0, 3, 6, 8, 10, 13, 15, 18, 21, 23, 26, 36, 39, 42, 45, 48]  # the first of 49
KEPT_THIRD = [0, 3, 6, 10, 13, 42, 45, 48, 52, 55, 84, 87, 91, 97, 129, 136, 175, 181, 183, 192]


@pytest.mark.parametrize(
    ("ratio", "loss", "kept"),
    [(0.25, 2.0061301606, []), (0.5, 2.0018484984, KEPT_HALF), (0.65, 2.0051706963, KEPT_THIRD)],
)
def test_mae_with_partial_reconstruction(ratio: float, loss: float, kept: list[int]) -> None:
    masked = random_mask()
    thrown = masked.clone()
    for b in range(2):
        first = int(masked[b].nonzero()[0, 0])
        thrown[b, furthest_sample(masked[b], (14, 14), 147 - int(ratio * 196), first)] = False
    plan = MaskPlan.from_mask(masked, thrown=thrown)
    assert plan.kept[0, : len(kept)].tolist() == kept
    model = load_official("mae_vit", weights({**KEYS["mae_vit"], **PR_KEYS}))
    with torch.no_grad():
        output = model(images(224), plan)
    assert output.loss.item() == pytest.approx(loss, abs=6e-11)
    if ratio == 0.5:
        errors = token_errors(output, images(224))
        assert errors[:, :49].mean().item() == pytest.approx(2.0249502237, abs=6e-11)  # kept
        assert errors[:, 49:].mean().item() == pytest.approx(1.9902976358, abs=6e-11)  # thrown
        _, patch, _ = run(model, "mae_vit", plan, 224)
        assert patch == close(2.44101052e-01)


def token_errors(output: MIMOutput, image: Tensor) -> Tensor:
    """(B, n) mean squared error of each predicted token, kept ones first."""
    cells = image.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).reshape(2, 196, 768)
    target = (cells - cells.mean(-1, keepdim=True)) / (cells.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (output.prediction - target).square().mean(-1)
    return error.gather(1, output.ids)
