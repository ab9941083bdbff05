"""Labels are compared by the names of their classes: of an evaluation, a monitor and a dry run."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from tests.conftest import TINY_MAE
from tests.downstream.labelled import build_shards, write_pictures, write_recipe
from ummim.data import ShardIndex
from ummim.downstream.class_names import compare_with_run
from ummim.downstream.dry_run import evaluation_rows
from ummim.downstream.monitor import Monitor
from ummim.downstream.recipe import ClassifyRecipe
from ummim.downstream.trained import load_trained
from ummim.engine import zero
from ummim.errors import CheckpointError, DataError
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """``train`` and ``val`` of three colours, and ``upper``, of the last two alone."""
    build_shards(tmp_path)
    shutil.copytree(tmp_path / "val-pictures", tmp_path / "pictures")
    shutil.rmtree(tmp_path / "pictures" / "blue")
    build(tmp_path / "pictures", tmp_path / "upper")
    return tmp_path


def build(pictures: Path, shards: Path, *words: str) -> None:
    assert data_prep(["build", str(pictures), str(shards), "--workers", "1", *words]) == 0


def recipe_on(folder: Path, *words: str) -> ClassifyRecipe:
    return load_recipe(str(write_recipe(folder, folder / "run")), words, ClassifyRecipe)


def test_a_set_is_compared_with_the_training_shards_or_else_the_validation_shards(sets: Path) -> None:
    upper, val = ShardIndex.open(sets / "upper"), ShardIndex.open(sets / "val")
    recipe = recipe_on(sets)
    assert compare_with_run(recipe, val, "--shards") == ""
    with pytest.raises(DataError, match="--shards: .*upper has other classes than .*train .*ummim robustness RUN"):
        compare_with_run(recipe, upper, "--shards")
    shutil.rmtree(sets / "train")
    with pytest.raises(DataError, match="--shards: .*upper has other classes than .*val "):
        compare_with_run(recipe, upper, "--shards")
    away = replace(recipe, classify=replace(recipe.classify, val_shards="/nowhere/val"))
    told = compare_with_run(away, upper, "--shards")
    assert "could not be compared" in told and "classify.val_shards=/nowhere/val" in told and "\n" not in told


def test_a_monitor_refuses_sets_of_other_classes(sets: Path, world: zero.World) -> None:
    (sets / "mae.yaml").write_text(TINY_MAE.replace("SHARDS", str(sets / "train")).replace("OUTPUT", str(sets / "mae")))
    words = [f"monitor.shards={sets}/train", f"monitor.val_shards={sets}/upper", "data.workers=0"]
    recipe = load_recipe(str(sets / "mae.yaml"), words, Recipe)
    with pytest.raises(DataError, match="monitor.val_shards: .*upper has other classes than .*train"):
        Monitor(recipe, recipe.plan(1, 24), world, None)


def test_a_dry_run_refuses_the_sets_that_the_run_would_refuse(sets: Path) -> None:
    rows, _ = evaluation_rows(recipe_on(sets))
    assert "21 images" in dict(rows)["validation"]
    with pytest.raises(DataError, match="classify.val_shards: .*upper has other classes than .*train"):
        evaluation_rows(recipe_on(sets, f"classify.val_shards={sets}/upper"))
    with pytest.raises(DataError, match="data.shards: .*train has labels up to 2: set classify.classes=3"):
        evaluation_rows(recipe_on(sets, "classify.classes=2", "classify.val_shards=/nowhere"))
    write_pictures(sets / "flat" / "all", 4, 0)
    pictures = sorted((sets / "flat" / "all").rglob("*.png"))
    for picture in pictures:
        picture.rename(sets / "flat" / picture.name)
    shutil.rmtree(sets / "flat" / "all")
    build(sets / "flat", sets / "unlabelled")
    with pytest.raises(DataError, match="data.shards: .*unlabelled has images without a label"):
        evaluation_rows(recipe_on(sets, f"data.shards={sets}/unlabelled"))
    rows, _ = evaluation_rows(recipe_on(sets, "data.shards=/nowhere"))
    assert "21 images" in dict(rows)["validation"]


def test_a_run_of_neighbours_says_that_it_has_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    file = write_recipe(tmp_path, tmp_path / "run")
    text = file.read_text().replace("classify:", "classify:\n  protocol: knn").replace("layer_decay: 0.75", "")
    (tmp_path / "run" / "recipe.yaml").write_text(text)
    with pytest.raises(CheckpointError, match="leave no checkpoint: their accuracy is in evaluation.json"):
        load_trained(tmp_path / "run")
