"""The gradient study runs, goes on where it was cut off, and measures what it says; likewise the count of context."""

import json
import sys

import numpy as np
import pytest
import torch

from ummim.masking import MaskConfig, PlanSampler


@pytest.fixture
def smoke(module, tmp_path, monkeypatch):
    """the study's --smoke, in this process: () -> what it wrote"""

    def main():
        output, runs = tmp_path / "results.json", tmp_path / "runs"
        arguments = ["gradient_deviation.py", "--smoke", "--runs", str(runs), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", arguments)
        module("gradient_deviation").main()
        return json.loads(output.read_text())

    return main


def test_it_runs_and_goes_on_where_it_was_cut_off(smoke, tmp_path):
    results = smoke()
    assert list(results["after"]) == ["2", "5"]
    row = results["after"]["5"]["gradients"]["encoder"]["50% PR-MIM"]
    assert row["deviation"]["mean"] > 0 and -1 <= row["cosine"]["mean"] <= 1
    runs = tmp_path / "runs"
    before = {path.name: path.stat().st_mtime_ns for path in runs.glob("*.pt")}
    (runs / "fold-5-1.pt").unlink()
    assert smoke()["after"] == results["after"]
    redone = [name for name, when in before.items() if (runs / name).stat().st_mtime_ns != when]
    assert redone == ["fold-5-1.pt"]


def test_all_arms_have_the_same_visible_tokens_and_weights(module):
    parts = module("gradient_model")
    data, model = parts.Data(parts.SMOKE), parts.Model(parts.SMOKE)
    plans = [data.plan(3, 2, ratio, throwing) for ratio in (0.0, 0.25, 0.5) for throwing in parts.THROWING]
    assert all(plan.visible.equal(plans[0].visible) for plan in plans)
    assert not data.plan(3, 2, draw=1).visible.equal(plans[0].visible)
    shared = {id(parameter) for part in model.shared().values() for parameter in part}
    apart = [name for name, parameter in model.named_parameters() if id(parameter) not in shared]
    assert apart == [
        f"partial.{ratio}.aggregation.layer.{key}" for ratio in ("25%", "50%", "65%") for key in ("weight", "bias")
    ]


def test_kept_and_thrown_tokens_make_up_the_whole_gradient(module):
    """Losses and gradients of the two, weighted by their number, are those of all masked tokens."""
    study, parts = module("gradient_deviation"), module("gradient_model")
    torch.manual_seed(0)
    data, model = parts.Data(parts.SMOKE), parts.Model(parts.SMOKE)
    gradients = study.Gradients(model)
    found = {name: (loss, own, of) for name, loss, own, of in study.compare(model, gradients, data, 7, 2)}
    share = 49 / 147  # 98 of 196 tokens are thrown
    for i in (0, 1):
        together = share * found["50% kept"][i] + (1 - share) * found["50% thrown"][i]
        torch.testing.assert_close(torch.as_tensor(together), torch.as_tensor(found["50% PR-MIM"][i]))
    full = share * found["50% kept"][2] + (1 - share) * found["50% thrown"][2]
    torch.testing.assert_close(full, found["full"][1])
    images, plan = data.images(7, 2), data.plan(7, 2, 0.5, "furthest")
    whole = model.full(images, data.plan(7, 2))
    target = parts.pixel_targets(images, plan.thrown, 8, True)
    loss = (whole.prediction.gather(1, plan.thrown[:, :, None].expand(-1, -1, 192)) - target).square().mean()
    torch.testing.assert_close(gradients(loss), found["50% thrown"][2], rtol=1e-3, atol=1e-5)


def test_bias_is_found_under_noise_that_is_larger(module):
    report, rng = module("gradient_report"), torch.Generator().manual_seed(0)
    full = torch.zeros(6, 20000, dtype=torch.float64)
    full[:, 0] = 1.0
    own = full.clone()
    own[:, 1] = 0.5
    noise = torch.randn(full.shape, generator=rng, dtype=torch.float64) / 20000**0.5  # as long as the gradient
    found = report.expected(own + noise, full)
    assert found["bias"]["mean"] == pytest.approx(0.5, abs=0.05)
    assert found["cosine_of_means"]["mean"] == pytest.approx(1 / 1.25**0.5, abs=0.05)


@pytest.mark.parametrize("throwing", ["random", "furthest"])
def test_context_is_counted_as_by_a_plain_loop(module, throwing):
    context = module("thrown_context")
    sampler = PlanSampler((14, 14), MaskConfig(throwing=throwing), 0.65)
    found = context.count(sampler, 3)
    numbers, gaps = [], []
    for i in range(3):
        plan = sampler(context.sample_seed(0, 0, str(i)))
        others = [divmod(int(j), 14) for j in (*plan.visible, *plan.kept)]
        for row, col in (divmod(int(j), 14) for j in plan.thrown):
            numbers.append(sum(abs(r - row) <= 1 and abs(c - col) <= 1 for r, c in others))
            gaps.append(min(((r - row) ** 2 + (c - col) ** 2) ** 0.5 for r, c in others))
    assert found["windows"]["3"]["without_context"] == pytest.approx(np.mean([n == 0 for n in numbers]))
    assert found["windows"]["3"]["mean"] == pytest.approx(np.mean(numbers))
    assert found["to_context"]["mean"] == pytest.approx(np.mean(gaps))
    assert found["to_context"]["maximum"] == pytest.approx(max(gaps))
