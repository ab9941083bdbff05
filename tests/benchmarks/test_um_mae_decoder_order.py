"""The study of UM-MAE's decoder order still runs, is paired, and goes on where it was cut off."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ummim.masking import MaskConfig, PlanSampler, sample_seed

PARTS = ["fixed-0-pretraining", "fixed-0-tuning", "legacy-0-pretraining", "legacy-0-tuning", "scratch-0-tuning"]


@pytest.fixture
def smoke(module, fashion, tmp_path, monkeypatch):
    """the script's --smoke, in this process: () -> what it wrote"""

    def main():
        output, runs = str(tmp_path / "results.json"), str(tmp_path / "runs")
        arguments = ["--smoke", "--data", str(fashion), "--runs", runs, "--output", output]
        monkeypatch.setattr(sys, "argv", ["um_mae_decoder_order.py", *arguments])
        module("um_mae_decoder_order").main()
        return json.loads(Path(output).read_text())

    return main


def test_it_runs_and_goes_on_where_it_was_cut_off(smoke, tmp_path, capsys):
    results = smoke()
    assert "held-out loss" in capsys.readouterr().out
    assert [run["arm"] for run in results["runs"]] == ["fixed", "legacy", "scratch"]
    fixed, legacy, scratch = results["runs"]
    assert len(fixed["curve"]) == len(legacy["curve"]) == 2
    assert fixed["held_out_loss"] != legacy["held_out_loss"]
    assert all(run["swapped_loss"] != run["held_out_loss"] for run in (fixed, legacy))
    assert "held_out_loss" not in scratch
    summary = results["summary"]["held_out_loss"]
    assert summary["fixed - legacy"]["mean"] == pytest.approx(fixed["held_out_loss"] - legacy["held_out_loss"])

    files = {name: tmp_path / "runs" / f"{name}.json" for name in PARTS}
    before = {name: file.stat().st_mtime_ns for name, file in files.items()}
    files["legacy-0-tuning"].unlink()
    again = smoke()
    redone = [name for name, file in files.items() if file.stat().st_mtime_ns != before[name]]
    assert redone == ["legacy-0-tuning"]
    assert again["runs"][1]["fine_tuned"] == legacy["fine_tuned"]  # the same numbers as before

    record = json.loads(files["fixed-0-tuning"].read_text())
    record["settings"]["tuning"]["labels"] += 1
    files["fixed-0-tuning"].write_text(json.dumps(record))
    with pytest.raises(ValueError, match="has other settings"):
        smoke()


@pytest.mark.parametrize("side", [4, 8, 16])
def test_the_share_in_place_is_that_of_drawn_masks(module, side):
    sampler = PlanSampler((side, side), MaskConfig("uniform", 0.75))
    visible = np.stack([sampler(sample_seed(0, 0, str(i))).visible for i in range(4000)])
    drawn = (np.sort(visible, axis=1) == visible).mean()
    assert module("um_mae_decoder_order").share_in_place(side) == pytest.approx(drawn, abs=0.01)


def test_the_share_in_place_of_the_paper_s_grid_is_the_official_code_s(module):
    assert round(module("um_mae_decoder_order").share_in_place(16), 3) == 0.245  # official: 24.6% of 2000 masks


def test_a_pixel_becomes_a_token_with_background_around(module, fashion):
    data = module("fashion_mnist").Data(fashion)
    images = data.test_images[:3]
    x = data.inputs(images)
    assert x.shape == (3, 3, 128, 128)
    raw = (x * data.deviation + data.mean) * 255
    assert raw[:, :, :8].abs().max() < 1e-3  # two pixels of background, four times as large
    for channel in range(3):
        for row, col in ((8, 8), (11, 11), (60, 70), (119, 119)):
            pixel = images[:, (row - 8) // 4, (col - 8) // 4].float()
            assert (raw[:, channel, row, col] - pixel).abs().max() < 1e-3
    inputs = data.inputs(data.train_images)
    assert abs(inputs.mean().item()) < 1e-3
    assert abs(inputs.std().item() - 1) < 1e-3


def test_other_files_are_refused(module, tmp_path):
    read_idx = module("fashion_mnist").read_idx
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(b"\0\0\x0d\x01" + b"\0" * 8))
    with pytest.raises(ValueError, match="no IDX file of bytes"):
        read_idx(path)
    path.write_bytes(gzip.compress(b"\0\0\x08\x01" + np.array([5], ">u4").tobytes() + b"\0" * 4))
    with pytest.raises(ValueError, match="holds 4 bytes of 5"):
        read_idx(path)


def test_frozen_features_that_separate_the_classes_are_classified(module):
    import torch

    probe = module("probe")
    labels = torch.arange(60) % 3
    features = torch.eye(3)[labels] + 0.05 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    for method in (probe.linear_probe, probe.nearest_neighbours):
        guess = method(features[:45], labels[:45], features[45:], 3)
        assert probe.accuracy(guess, labels[45:]) == 1.0


def test_paired_differences_are_taken_seed_by_seed(module):
    loss = {("fixed", 0): 1.0, ("fixed", 1): 2.0, ("fixed", 2): 4.0, ("legacy", 0): 1.5, ("legacy", 1): 3.0}
    loss["legacy", 2] = 5.5
    runs = [{"arm": arm, "seed": seed, "held_out_loss": value} for (arm, seed), value in reversed(loss.items())]
    rows = module("decoder_order_report").summarise(runs)["held_out_loss"]
    assert sorted(rows["fixed - legacy"]["values"]) == [-1.5, -1.0, -0.5]
    assert rows["fixed - legacy"]["mean"] == -1.0
    assert rows["fixed - legacy"]["interval"] == pytest.approx(4.302653 * 0.5 / 3**0.5)
    assert rows["fixed"]["deviation"] == pytest.approx(np.std([1, 2, 4], ddof=1))
