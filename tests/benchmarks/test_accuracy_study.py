"""The accuracy study's rows are paired, it runs, and it goes on where it was cut off."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.benchmarks.conftest import BENCHMARKS

NAMES = ["full", *(f"r{r}-{kind}" for r in (25, 50, 65) for kind in ("plain", "progressive", "furthest", "both"))]


@pytest.fixture
def study(module):
    return module("accuracy_study")


@pytest.fixture
def rows(module):
    return module("accuracy_rows")


@pytest.fixture
def arguments(fashion, tmp_path):
    files = ["--data", str(fashion), "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "results.json")]
    return ["--smoke", "--rows", "options", "--device", "cpu", *files]


@pytest.fixture
def models(module):
    return module("accuracy_models")


def plans(study, row):
    return study.draw_plan(study.PlanSampler(study.GRID, row.mask, row.ratio), 3, 1, range(6))


def test_the_table_has_the_paper_s_thirteen_rows(rows, module):
    assert [row.name for row in rows.TABLE] == NAMES
    assert set(module("accuracy_report").PUBLISHED) == set(NAMES)
    for row in rows.TABLE[1:]:
        ratio, kind = row.name.split("-")
        assert row.ratio == int(ratio[1:]) / 100
        assert (row.partial.aggregation == "conv") == (kind in ("progressive", "both"))
        assert (row.mask.throwing == "furthest") == (kind in ("furthest", "both"))
    names = [row.name for row in rows.GROUPS["all"]]
    assert len(set(names)) == len(names)
    assert {row.reference for row in rows.GROUPS["all"]} <= set(names)


def test_all_rows_see_the_same_masks_and_throw_their_share(study, rows):
    visible = plans(study, rows.TABLE[0]).visible
    assert visible.shape == (6, 49)
    for row in rows.TABLE + rows.OPTIONS:
        plan = plans(study, row)
        assert torch.equal(plan.visible, visible)
        assert torch.equal(plan.masked.sort().values, plans(study, rows.TABLE[0]).kept)
        assert plan.thrown.shape[1] == int(196 * row.ratio)


def test_rows_throw_the_same_tokens_exactly_if_they_throw_alike(study, rows):
    kept = {row.name: plans(study, row).kept for row in rows.TABLE}
    for ratio in (25, 50, 65):
        plain, progressive, furthest, both = (kept[name] for name in NAMES if name.startswith(f"r{ratio}"))
        assert torch.equal(plain, progressive)
        assert torch.equal(furthest, both)
        assert not torch.equal(plain, furthest)


def test_rows_of_another_method_share_their_masks_too(study, rows):
    for group, hidden, thrown in ((rows.SIMMIM, 120, [0, 98, 96]), (rows.TEC, 147, [0, 98, 98])):
        masked = [plans(study, row).masked.sort().values for row in group]
        assert masked[0].shape == (6, hidden)
        assert all(torch.equal(found, masked[0]) for found in masked)
        assert [plans(study, row).thrown.shape[1] for row in group] == thrown


def test_all_rows_start_from_the_same_weights(study, models, rows):
    model = study.SMOKE.model
    full = models.build(rows.TABLE[0], model, 5).state_dict()
    fills = set()
    for row in rows.TABLE + rows.OPTIONS:
        state = models.build(row, model, 5).state_dict()
        assert all(torch.equal(state[key], value) for key, value in full.items())
        extra = set(state) - set(full)
        assert bool(extra) == (row.partial.aggregation not in ("none", "pool"))
        assert all(key.startswith("aggregation.") for key in extra)
        if row in rows.TABLE:
            fills |= {tuple(state[key].flatten().tolist()) for key in sorted(extra)}
    assert len(fills) == 2  # one weight and one bias: the convolution starts alike in every row that has one
    assert not torch.equal(
        full["head.pred.weight"], models.build(rows.TABLE[0], model, 6).state_dict()["head.pred.weight"]
    )


@pytest.mark.parametrize("group", ["simmim", "tec"])
def test_every_method_s_encoder_becomes_a_classifier(study, models, rows, group, fashion, tmp_path):
    model = models.Model(16, 3, 2, 16, 1, 2)
    images = study.load(fashion, "cpu").inputs(study.load(fashion, "cpu").test_images[:4])
    teacher = tmp_path / "full-0.safetensors"
    study.save_file(models.build(rows.TABLE[0], model, 0).backbone().state_dict(), teacher)
    for row in rows.GROUPS[group]:
        method = models.build(row, model, 0, teacher)
        study.save_file(method.backbone().state_dict(), tmp_path / "encoder.safetensors")
        losses = study.held_out_losses(method, row, study.load(fashion, "cpu"), 8, "cpu")
        assert set(losses) == {"masked_loss", "whole_loss"}
        classifier = models.classifier(group, model, 1, tmp_path / "encoder.safetensors")
        assert torch.equal(classifier.features(images), models.mean_of_tokens(method.backbone().eval()(images)))


def test_losses_of_a_row_that_throws_nothing_are_one_and_the_same(study, models, rows, fashion):
    data = study.load(fashion, "cpu")
    losses = {}
    for row in (rows.TABLE[0], rows.TABLE[4], rows.TABLE[3]):
        method = models.build(row, study.SMOKE.model, 0)
        losses[row.name] = study.held_out_losses(method, row, data, 16, "cpu")
    full, both, furthest = losses["full"], losses["r25-both"], losses["r25-furthest"]
    assert full["kept_loss"] == pytest.approx(full["masked_loss"], rel=1e-5) == pytest.approx(full["whole_loss"])
    assert both["whole_loss"] == pytest.approx(full["whole_loss"], rel=1e-6)  # the same weights, nothing filled in
    assert both["kept_loss"] == pytest.approx(furthest["kept_loss"], rel=1e-6)
    assert both["masked_loss"] != pytest.approx(both["kept_loss"], rel=1e-6)
    assert "masked_loss" not in furthest


def test_new_options_leave_stored_results_valid_but_other_plans_do_not(study, rows):
    assert study.changed(rows.PartialConfig()) == {}
    assert study.changed(rows.NONE) == {"aggregation": "none"}
    prints = {row.name: study.fingerprint(study.PlanSampler(study.GRID, row.mask, row.ratio)) for row in rows.TABLE}
    assert len(set(prints.values())) == 7  # full, and three ratios thrown in two ways


def test_it_runs_and_goes_on_where_it_was_cut_off(study, arguments, tmp_path, monkeypatch):
    command = [sys.executable, str(BENCHMARKS / "accuracy_study.py"), *arguments, "--jobs", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "| r50-both, to full | " in done.stdout and "r50-both 81.8" in done.stdout and "Table 2" in done.stdout

    results = json.loads((tmp_path / "results.json").read_text())
    full, scratch, both = results["runs"][:3]
    assert [full["row"], scratch["row"], both["row"]] == ["full", "scratch", "r50-both"]
    assert len(full["curve"]) == 3 and "whole_loss" not in scratch
    difference = results["summary"]["whole_loss"]["differences"]["r50-both"]
    assert difference["mean"] == pytest.approx(both["whole_loss"] - full["whole_loss"])

    cut = tmp_path / "runs" / "r50-both-0-tuning.json"
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    cut.unlink()
    monkeypatch.setattr(sys, "argv", ["accuracy_study.py", *arguments])
    study.main()
    assert [file for file, time in before.items() if file.stat().st_mtime_ns != time] == [cut]
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["runs"][2]["fine_tuned"] == both["fine_tuned"]


def test_differences_and_effects_are_taken_seed_by_seed(module):
    rng, runs = np.random.default_rng(0), []
    for seed in range(3):
        noise = rng.normal()
        for name in [*NAMES, "scratch"]:
            both = name.endswith("both")
            gain = 2 * (both or name.endswith("progressive")) + (both or name.endswith("furthest"))
            runs.append({"row": name, "seed": seed, "fine_tuned": noise + gain + 0.1 * seed * both})
    summary = module("accuracy_report").summarise(runs)
    parts = summary["fine_tuned"]
    assert parts["differences"]["r25-plain"]["values"] == pytest.approx([0, 0, 0])
    assert parts["differences"]["r65-both"]["values"] == pytest.approx([3, 3.1, 3.2])
    assert parts["differences"]["r65-both"]["interval"] == pytest.approx(4.302653 * 0.1 / 3**0.5)
    assert parts["effects"]["progressive, all r"]["values"] == pytest.approx([2, 2.05, 2.1])
    assert parts["effects"]["both together, r=50%"]["mean"] == pytest.approx(3.1)

    lines = module("accuracy_report").table(summary, "differences", "interval", "+")
    assert lines[0] == "| | fine-tuned, % |" and "| r25-plain, to full | +0.00 ± 0.00 |" in lines
    assert "| r65-both, to full | **+310.00 ± 24.84** |" in lines

    runs = [run for run in runs if (run["row"], run["seed"]) != ("r50-both", 0)]  # seed 0 is left out where it counts
    parts = module("accuracy_report").summarise(runs)["fine_tuned"]
    assert len(parts["differences"]["r50-both"]["values"]) == 2
    assert len(parts["effects"]["progressive, all r"]["values"]) == 2
    assert len(parts["effects"]["progressive, r=25%"]["values"]) == 3
