"""The tables of the evidence study pair each method with its own encoder's control, seed by seed."""

import json
import sys

import pytest


@pytest.fixture
def report(module, tmp_path, monkeypatch, capsys):
    """what the report prints of a study whose results are ``value(row, seed)``, seeds apart"""

    def print_of(value, seeds):
        evidence = module("evidence")
        rows = [
            {"set": "made", "seed": seed, "row": row, "flops": 1.6e12, "fine_tuned": value(row, seed), "linear": 50.0}
            for seed in range(seeds)
            for row in (*evidence.CONTROLS, *evidence.METHODS)
        ]
        (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
        monkeypatch.setattr(sys, "argv", ["evidence_report.py", str(tmp_path / "results.json")])
        module("evidence_report").main()
        return capsys.readouterr().out

    return print_of


GAINS = {"swin": -10.0, "green_mim": 0.0, "simmim": 3.0}


def test_a_difference_is_to_the_own_control_and_of_the_same_seed(report):
    """Seeds differ by 5 points in all rows alike, which says nothing about a method; SimMIM's gain differs by seed."""
    printed = report(lambda row, seed: 60 + 5 * seed + GAINS.get(row, 0) * (1 + seed * (row == "simmim")), 3)
    assert "| GreenMIM | Swin | 1.60 | 65.0 ± 5.0 | **+10.0 ± 0.0** | 50.0 ± 0.0 | +0.0 ± 0.0 |" in printed
    assert "| SimMIM | SimMIM's ViT | 1.60 | 71.0 ± 8.0 | +6.0 ± 7.5 |" in printed  # 3, 6, 9: 4.303 * 3 / sqrt(3)
    assert "beside MAE: fine-tuned +0.0 ± 0.0" in printed


def test_one_seed_has_no_interval(report):
    printed = report(lambda row, seed: 60 + GAINS.get(row, 0), 1)
    assert "| GreenMIM | Swin | 1.60 | 60.0 | +10.0 | 50.0 | +0.0 |" in printed
