"""The reconstruction figure tells visible, secondary, kept and thrown tokens apart."""

import numpy as np
import pytest
import torch

from ummim.masking import MaskPlan
from ummim.methods.api import MIMOutput
from ummim.nn.targets import normalise_patches, patchify, pixel_targets
from ummim.visualize import (
    COLUMNS,
    THROWN,
    Reconstruction,
    comparison_figure,
    predicted_pixels,
    reconstruction_figure,
    save_figure,
)

PATCH, GRID = 8, (4, 4)


def plan() -> MaskPlan:
    masked = torch.ones(1, 16, dtype=torch.bool)
    masked[0, [0, 2, 8, 10]] = False
    secondary, thrown = torch.zeros_like(masked), torch.zeros_like(masked)
    secondary[0, 10] = True
    thrown[0, [1, 15]] = True
    return MaskPlan.from_mask(masked, secondary, thrown)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_perfect_prediction_gives_back_the_image(norm_pix: bool):
    images = torch.rand(1, 3, 32, 32)
    ids = plan().masked
    output = MIMOutput(torch.zeros(()), pixel_targets(images, ids, PATCH, norm_pix), ids, 16)
    pixels, covered = predicted_pixels(images, output, PATCH, norm_pix)
    assert covered.float().mean() == 12 / 16
    where = covered.expand_as(images)
    torch.testing.assert_close(pixels[where], images[where])


def test_thrown_tokens_without_a_prediction_are_not_covered():
    images, kept = torch.rand(1, 3, 32, 32), plan().kept
    output = MIMOutput(torch.zeros(()), pixel_targets(images, kept, PATCH, False), kept, 16)
    _, covered = predicted_pixels(images, output, PATCH, False)
    assert not covered[0, 0, 0, PATCH]  # token 1
    assert covered.float().mean() == 10 / 16


def test_columns_show_plan_input_pasted_alone_and_original(tmp_path):
    images = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    prediction, covered = torch.zeros(1, 3, 32, 32), torch.ones(1, 1, 32, 32, dtype=torch.bool)
    picture = reconstruction_figure(images, plan(), prediction, covered, "title")
    save_figure(picture, tmp_path / "deep" / "figure.png")
    sheet = np.asarray(picture)
    side = (sheet.shape[1] - 6) // len(COLUMNS) - 6
    cells = [sheet[-side - 6 : -6, 6 + i * (side + 6) : 6 + i * (side + 6) + side] for i in range(len(COLUMNS))]
    step = side // 4

    def token(cell: np.ndarray, at: int) -> tuple[int, ...]:
        row, col = divmod(at, 4)
        return tuple(cell[row * step + step // 2, col * step + step // 2])

    input_plan, seen, pasted, alone, original = cells
    kinds = {
        name: token(input_plan, at) for name, at in (("visible", 0), ("secondary", 10), ("kept", 4), ("thrown", 1))
    }
    assert len(set(kinds.values())) == 4
    assert token(seen, 0) == (200, 200, 200)
    assert len({token(seen, at) for at in (0, 10, 4, 1)}) == 4
    assert token(pasted, 0) == (200, 200, 200)
    assert token(pasted, 4) == (0, 0, 0)
    assert token(alone, 1) == (0, 0, 0)
    assert (original == 200).all()


def test_a_comparison_draws_each_models_own_plan():
    images = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    full = MaskPlan.from_mask(plan().mask())
    made = [
        Reconstruction(p, torch.zeros(1, 3, 32, 32), torch.ones(1, 1, 32, 32, dtype=torch.bool)) for p in (full, plan())
    ]
    sheet = np.asarray(comparison_figure(images, [("full", made[0]), ("pr-mim", made[1])]))
    side = (sheet.shape[1] - 6) // 5 - 6
    thrown = [
        (sheet[-side - 6 : -6, 6 + i * (side + 6) :][:, :side] == THROWN).all(-1).mean() for i in range(5)
    ]  # share of each column: original, two for each model
    assert thrown == [0, 0, 0, pytest.approx(2 / 16), 0]
    pasted = sheet[-side - 6 : -6, -side - 6 : -6]
    assert (pasted == 200).all(-1).mean() == pytest.approx(4 / 16)  # visible patches


def test_a_comparison_leaves_grey_what_was_not_predicted():
    images = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    covered = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    made = Reconstruction(plan(), torch.ones(1, 3, 32, 32), covered)
    sheet = np.asarray(comparison_figure(images, [("plain", made)]))
    side = (sheet.shape[1] - 6) // 3 - 6
    pasted = sheet[-side - 6 : -6, -side - 6 : -6]
    assert (pasted == 200).all(-1).mean() == pytest.approx(4 / 16)  # visible patches
    assert (pasted == 128).all(-1).mean() == pytest.approx(12 / 16)


def test_normalised_patches_have_unbiased_unit_variance():
    patches, mean, deviation = normalise_patches(patchify(torch.rand(1, 3, 32, 32), PATCH))
    torch.testing.assert_close(patches.var(dim=-1), torch.ones(1, 16), rtol=0, atol=1e-3)
    assert mean.shape == deviation.shape == (1, 16, 1)
