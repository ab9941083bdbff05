"""Nearest neighbours on a side set while a pre-training runs: told in the metrics, felt nowhere."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import forked
from tests.conftest import ROOT, TINY_MAE, TINY_UM_MAE
from tests.data_prep.web import served
from tests.downstream.labelled import build_shards
from ummim.dry_run import dry_run
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


def test_side_sets_behind_a_url_come_through_the_cache_and_tell_the_same(
    sets: Path, write_recipe: Any, tmp_path: Path
) -> None:
    recipe, seen = write_recipe(TINY_MAE, sets / "train"), []
    with served(sets) as url:
        for name, place, more in (("near", str(sets), []), ("far", url, [f"data.cache={tmp_path}/cache"])):
            side = [f"monitor.shards={place}/train", f"monitor.val_shards={place}/val", "epochs=2", "monitor.every=1"]
            ended = forked.run(["train.py", recipe, f"output={tmp_path / name}", *side, *more], ROOT)
            assert ended.returncode == 0, ended.stderr
            seen.append([(line["step"], line["knn_top1"]) for line in lines(tmp_path / name) if "knn_top1" in line])
    assert seen[0] == seen[1]
    assert [step for step, _ in seen[0]] == [3, 6]
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 10  # five shards of each


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("missing", "is no folder of shards"),
        ("without shards", "index.json is missing"),
        ("without samples", "holds no images"),
    ],
)
def test_side_sets_that_hold_nothing_end_the_run_before_it_starts(
    sets: Path, write_recipe: Any, tmp_path: Path, what: str, told: str
) -> None:
    recipe, place = write_recipe(TINY_MAE, sets / "train"), tmp_path / "side"
    if what == "without shards":
        place.mkdir()
    elif what == "without samples":
        shutil.copytree(sets / "val", place)
        index = json.loads((place / "index.json").read_text())
        (place / "index.json").write_text(json.dumps({**index, "shards": []}))
        np.save(place / "index.npy", np.load(place / "index.npy")[:0])
    command = ["train.py", recipe, *watched(sets), f"monitor.val_shards={place}"]
    if what != "missing":
        planned = forked.run([*command, "--dry-run"], ROOT)
        assert planned.returncode == 2 and f"monitor.val_shards: {place}" in planned.stderr
    ended = forked.run(command, ROOT)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert f"monitor.val_shards: {place}" in ended.stderr and told in ended.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_dry_run_opens_the_side_sets_that_are_at_hand(sets: Path, write_recipe: Any) -> None:
    recipe = load_recipe(str(write_recipe(TINY_MAE, sets / "train")), watched(sets))
    report = dry_run(recipe, 1)
    assert [line.split(None, 1)[1] for line in report.splitlines() if line.startswith("monitor")] == [
        "20 nearest of 24 images classify 21, every 2 epochs"
    ]
    far = replace(recipe, monitor=replace(recipe.monitor, val_shards="https://nowhere.invalid/val"))
    assert "https://nowhere.invalid/val: not at hand; training needs it" in dry_run(far, 1)


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
