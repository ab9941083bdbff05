"""Nearest neighbours on a side set while a pre-training runs: told in the metrics, felt nowhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.conftest import ROOT, TINY_MAE, TINY_UM_MAE
from tests.downstream.labelled import build_shards
from ummim.errors import RecipeError
from ummim.interop.run import load_run
from ummim.recipe_file import load_recipe


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shards(tmp_path_factory.mktemp("sets"))


def watched(sets: Path) -> list[str]:
    return [f"monitor.shards={sets}/train", f"monitor.val_shards={sets}/val", "monitor.every=2", "data.workers=0"]


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("text", "ranks", "stage"), [(TINY_MAE, 1, 1), (TINY_UM_MAE, 2, 3)], ids=["MAE", "UM-MAE"])
def test_a_monitor_tells_the_accuracy_and_changes_no_bit(
    sets: Path, write_recipe: Any, tmp_path: Path, text: str, ranks: int, stage: int
):
    recipe = write_recipe(text, sets / "train")
    for name, words in (("plain", []), ("watched", watched(sets))):
        command = ["train.py", recipe, f"output={tmp_path / name}", f"zero_stage={stage}", "epochs=3", *words]
        for ended in forked.run_ranks(ranks, command, ROOT):
            assert ended.returncode == 0, ended.stderr
    plain, seen = lines(tmp_path / "plain"), lines(tmp_path / "watched")
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in seen] == [
        (line["step"], line["loss"], line["grad_norm"]) for line in plain
    ]
    assert not any("knn_top1" in line for line in plain)
    assert {line["step"] for line in seen if "knn_top1" in line} == {6, 9}  # epochs of 3 steps: every second, the last
    assert 100 / 3 < seen[-1]["knn_top1"] <= 100  # three colours
    folders = [tmp_path / name / "checkpoints" / "step-9" for name in ("plain", "watched")]
    _, one, _ = load_run(folders[0])
    _, other, _ = load_run(folders[1])
    assert all((a == b).all() for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_shards_that_cannot_be_read_end_the_run_before_it_starts(sets: Path, write_recipe: Any, tmp_path: Path):
    recipe = write_recipe(TINY_MAE, sets / "train")
    ended = forked.run(["train.py", recipe, *watched(sets), f"monitor.val_shards={tmp_path}/nothing"], ROOT)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "monitor.val_shards: " in ended.stderr and str(tmp_path / "nothing") in ended.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("monitor.shards=/data", "monitor.val_shards.*: goes with monitor.shards"),
        ("monitor.every=0", "monitor.every = 0: must be at least 1"),
        ("monitor.neighbours=0", "monitor.neighbours"),
        ("monitor.temperature=0", "monitor.temperature"),
    ],
)
def test_values_that_cannot_work_are_refused(write_recipe: Any, override: str, told: str):
    with pytest.raises(RecipeError, match=told):
        load_recipe(str(write_recipe(TINY_MAE)), [override])
