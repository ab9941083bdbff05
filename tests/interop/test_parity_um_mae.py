"""UM-MAE on ViT-B and PVT-S, full size, in float64, against the official code's numbers.

Swin-T's are in test_official_parity.py. The mended order of PVT is not official: it comes from another's reference.
"""

from typing import Any

import pytest
import torch

from tests.interop.fixtures import KEYS, images, noise, uniform_mask, weights
from tests.interop.test_official_parity import close, run
from ummim.interop import load_official
from ummim.masking import MaskPlan


def uniform_mask_of_a_vit() -> tuple[torch.Tensor, torch.Tensor]:
    """(2, 196) bool masked, and secondary: 13 of the 49 visible."""
    masked = torch.ones(2, 14, 14, dtype=torch.bool)
    for b in range(2):
        for i in range(7):
            for j in range(7):
                cell = (3 * i + 5 * j + b + i * j) % 4
                masked[b, 2 * i + cell // 2, 2 * j + cell % 2] = False
    masked = masked.flatten(1)
    visible = (~masked).nonzero()[:, 1].view(2, 49)
    hidden = noise(49).argsort(1) >= 36  # the order of the noise gathers from 36 zeros and 13 ones
    return masked, torch.zeros_like(masked).scatter(1, visible, hidden)


def without_secondary(family: str) -> Any:
    keys = {name: shape for name, shape in KEYS[family].items() if name != "vis_mask_token"}
    return load_official(family, weights(keys))


def test_vit_without_secondary_masking() -> None:
    plan = MaskPlan.from_mask(uniform_mask_of_a_vit()[0])
    output, patch, every = run(without_secondary("um_mae_vit"), "um_mae_vit", plan, 224)
    assert output.loss.item() == pytest.approx(1.9632179655, abs=6e-11)
    assert (patch, every) == (close(2.84503074e-01), close(4.03654009))


def test_vit_with_secondary_masking() -> None:
    model = load_official("um_mae_vit", weights(KEYS["um_mae_vit"]))
    output, patch, every = run(model, "um_mae_vit", MaskPlan.from_mask(*uniform_mask_of_a_vit()), 224)
    assert output.loss.item() == pytest.approx(1.9673908821, abs=6e-11)
    assert (patch, every) == (close(2.19005218e-01), close(4.06089242))


def test_pvt_without_secondary_masking() -> None:
    plan = MaskPlan.from_mask(uniform_mask()[0])
    output, patch, every = run(without_secondary("um_mae_pvt"), "um_mae_pvt", plan, 256)
    assert output.loss.item() == pytest.approx(1.9664567320, abs=6e-11)
    assert (patch, every) == (close(4.25908982e-02), close(3.68116614))


def test_pvt_with_secondary_masking_in_the_official_and_the_mended_order() -> None:
    model: Any = load_official("um_mae_pvt", weights(KEYS["um_mae_pvt"]))
    plan = MaskPlan.from_mask(*uniform_mask())
    output, patch, every = run(model, "um_mae_pvt", plan, 256)
    assert output.loss.item() == pytest.approx(1.9672207732, abs=6e-11)
    assert (patch, every) == (close(3.46422692e-02), close(3.68827669))
    assert model.legacy_decoder_order is True
    model.legacy_decoder_order = False
    with torch.no_grad():
        assert model(images(256), plan).loss.item() == pytest.approx(1.9667977876, abs=6e-11)
