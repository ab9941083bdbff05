"""``ummim status``: the newest whole checkpoint against where the run ends."""

import json
from pathlib import Path

import pytest

from tests.conftest import TINY_MAE
from ummim.__main__ import main
from ummim.engine.checkpoint import RunState, seal
from ummim.recipe_file import dump_recipe, load_recipe


@pytest.fixture
def recipe(write_recipe) -> Path:
    """4 epochs of 3 steps each over 26 images."""
    return write_recipe(TINY_MAE)


def save(recipe_file: Path, folder: Path, step: int) -> Path:
    """A checkpoint without weights, as far as its state and manifest go."""
    recipe = load_recipe(str(recipe_file))
    checkpoint = folder / "checkpoints" / f"step-{step}"
    checkpoint.mkdir(parents=True)
    state = RunState.at(step, recipe, recipe.plan(2, 26), "digest", "layout")
    (checkpoint / "state.json").write_text(json.dumps(vars(state)))
    seal(checkpoint)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return checkpoint


def test_only_a_run_at_its_end_gives_0(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    assert main(["status", str(recipe)]) == 1
    assert "no checkpoint yet" in capsys.readouterr().out
    save(recipe, run, 7)
    assert main(["status", str(recipe)]) == main(["status", str(run)]) == 1
    assert f"{run}: step 7 of 12 in step-7, not ended" in capsys.readouterr().out
    assert main(["status", str(recipe), "max_steps=7"]) == 0
    newest = save(recipe, run, 12)
    assert main(["status", str(run)]) == main(["status", str(recipe)]) == 0
    assert f"{run}: step 12 of 12 in step-12, ended" in capsys.readouterr().out
    (newest / "state.json").write_text("{}")  # torn
    assert main(["status", str(run)]) == 1
    assert "step 7 of 12" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["status", str(tmp_path)]) == 2
    assert "has no recipe.yaml" in capsys.readouterr().err
    assert main(["status", str(tmp_path / "nothing")]) == 2
    assert "no packaged recipe" in capsys.readouterr().err
