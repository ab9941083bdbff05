"""AMT on MAE, full size in float64, against the numbers of the official code (docs/fidelity.md)."""

import pytest
import torch

from tests.interop.fixtures import KEYS, noise, weights
from tests.interop.test_official_parity import close, run
from ummim.interop import load_official
from ummim.masking import MaskPlan
from ummim.methods.amt import AMTMAE, Config


def test_amt_on_mae_after_the_first_refresh() -> None:
    """45% masked, 40% thrown; the noise's order in place of a weighted draw."""
    order = noise(196).argsort(1)
    masked = torch.ones(2, 196, dtype=torch.bool).scatter(1, order[:, 166:], False)
    thrown = torch.zeros(2, 196, dtype=torch.bool).scatter(1, order[:, 88:166], True)
    plan = MaskPlan.from_mask(masked, thrown=thrown)
    assert [ids.shape for ids in (plan.visible, plan.kept, plan.thrown)] == [(2, 30), (2, 88), (2, 78)]
    official = load_official("mae_vit", weights(KEYS["mae_vit"]))
    with torch.device("meta"):
        model = AMTMAE(224, Config(norm_pix_loss=True).framework)  # type: ignore[arg-type]
    model.load_state_dict(official.state_dict(), assign=True)
    output, patch, every = run(model, "mae_vit", plan, 224)
    assert output.predicted.shape == (2, 88, 768)
    assert output.loss.item() == pytest.approx(2.0267450097, abs=6e-11)
    assert (patch, every) == (close(3.37483419e-01), close(5.61502822))
