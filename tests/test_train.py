"""The main job as a user runs it: train.py alone and under both launchers, killed, resumed, mistyped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main as data_prep
from tests import forked
from tests.conftest import ROOT, TINY_MAE, TINY_UM_MAE
from ummim.recipe_file import packaged_recipes

LOGGED = {"step", "epoch", "samples", "loss", "lr", "grad_norm", "images_per_second"}
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 small pictures in four shards."""
    source, out = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("data") / "shards"
    rng = np.random.default_rng(0)
    for i in range(26):
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        folder = source / f"class{i % 2}"
        folder.mkdir(exist_ok=True)
        small.resize((72, 72), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.jpg")
    assert data_prep(["build", str(source), str(out), "--shard-count", "7"]) == 0
    return out


def run(*command: Any, **extra: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", **extra}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def train(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return forked.run(["train.py", *arguments], ROOT)


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> dict[int, float]:
    records = metrics(output)
    found = {record["step"]: record["loss"] for record in records}
    assert len(found) == len(records), "a step appears twice"
    return found


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of twelve steps of UM-MAE with PR-MIM, never stopped, with data workers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY_UM_MAE.replace("SHARDS", str(shards)) + f"output: {folder / 'run'}\n")
    result = run(sys.executable, "train.py", recipe, "data.workers=1", "tensorboard=true")
    assert result.returncode == 0, result.stderr
    assert "step 12/12" in result.stdout
    return folder / "run"


def test_run_folder_holds_what_the_contract_says(undisturbed: Path):
    records = metrics(undisturbed)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert all(record.keys() >= LOGGED for record in records)
    assert records[2]["epoch"] == 1.0
    assert records[2]["samples"] == 24
    environment = json.loads((undisturbed / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert len(environment["shard_digest"]) == 64
    for name in ("recipe.yaml", "checkpoints/step-12/manifest.json", "checkpoints/step-12/model.safetensors"):
        assert (undisturbed / name).is_file()
    assert list((undisturbed / "tensorboard").iterdir())
    pictures = sorted(p.name for p in (undisturbed / "reconstructions").iterdir())
    assert pictures == ["epoch-0002.png", "epoch-0004.png"]


def test_resolved_recipe_of_a_run_starts_the_same_run(undisturbed: Path):
    result = train(undisturbed / "recipe.yaml")
    assert result.returncode == 0
    assert "resuming" in result.stderr
    assert len(losses(undisturbed)) == 12


def test_killed_run_goes_on_bit_for_bit(undisturbed: Path, shards: Path, write_recipe: Any, tmp_path: Path):
    recipe = write_recipe(TINY_UM_MAE, shards)
    process = forked.Job(["train.py", recipe, "data.workers=1", "max_steps=100", "epochs=4"], ROOT)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "step-4").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / "checkpoints" / "step-4").exists()
    result = train(recipe)
    assert result.returncode == 0, result.stderr
    told = [line for line in result.stderr.splitlines() if "with another recipe" in line]
    assert sorted(line.split("another recipe: ")[1].split(":")[0] for line in told) == ["max_steps"], result.stderr
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_interrupted_run_saves_and_a_second_one_in_its_folder_is_refused(
    undisturbed: Path, shards: Path, write_recipe: Any, tmp_path: Path
):
    recipe = write_recipe(TINY_UM_MAE, shards)
    process = forked.Job(["train.py", recipe, "checkpoint_every=1000", "epochs=400"], ROOT)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    second = train(recipe, "epochs=400")
    assert second.returncode == 2
    assert "another run is writing here" in second.stderr
    process.send_signal(signal.SIGINT)
    ended = process.wait(60)
    assert ended.returncode == 130
    assert "saved; the same command goes on from here" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


def test_launchers_run_the_same_job_on_two_ranks(shards: Path, write_recipe: Any, tmp_path: Path):
    recipe = write_recipe(TINY_MAE, shards)
    launchers = {
        "torchrun": ("torchrun", "--nproc_per_node", "2"),
        "deepspeed": ("deepspeed", "--num_accelerators", "2", "--master_port", "29641"),
    }
    for name, launcher in launchers.items():
        words = [BIN / launcher[0], *launcher[1:], "train.py", recipe, f"output={tmp_path / name}", "max_steps=5"]
        result = run(*words)
        assert result.returncode == 0, result.stdout + result.stderr
        state = json.loads((tmp_path / name / "checkpoints" / "step-5" / "state.json").read_text())
        assert state["world_size"] == 2
    assert losses(tmp_path / "torchrun") == losses(tmp_path / "deepspeed")


@pytest.mark.parametrize("name", packaged_recipes())
def test_dry_run_needs_neither_gpu_nor_imagenet(name: str, capsys: pytest.CaptureFixture[str]):
    from train import main

    ranks = "1" if name == "quickstart" else "64"
    arguments = [name, "--dry-run", "--world-size", ranks, "data.shards=/nowhere"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for row in ("parameters", "tokens", "batch", "steps", "learning rate", "ZeRO-3", "not at hand"):
        assert row in printed


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("simmim_vit_base_800e", "2e-06 to 4.000e-04 over 6,250 steps, then times 0.1 after epochs 700 (base 0.0001"),
        ("mae_vit_base_800e", "0 to 2.400e-03 over 12,480 steps, then a cosine to 0 (base 0.00015 per 256 images)"),
        ("simmim_vit_base_800e", "weight decay 0.05, gradients clipped to norm 5"),
        ("amt_mae_vit_base_400e", "epoch 40 on    30 visible, 88 kept, 78 thrown, by attention"),
        ("green_mim_swin_base_200e", "random mask, one for 512 images"),
        ("pr_mae_vit_base_800e", "by furthest sampling of those that are kept, ties: random; filled in by conv 7x7"),
        ("plain_mae_vit_base_800e", "thrown         tokens at random; in no loss"),
        ("tec_vit_base_300e", "file           teachers/ibot_vit_base_patch16.pth: not at hand; training needs it"),
    ],
)
def test_dry_run_says_what_is_particular_to_a_recipe(name: str, row: str, capsys: pytest.CaptureFixture[str]):
    from train import main

    assert main([name, "--dry-run", "--world-size", "8", "data.shards=/nowhere"]) == 0
    assert row in capsys.readouterr().out


def test_dry_run_reads_the_data_that_is_there_and_trains_nothing(shards: Path, write_recipe: Any, tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]):  # fmt: skip
    from train import main

    assert main([str(write_recipe(TINY_MAE, shards)), "--dry-run"]) == 0
    assert "26 images" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["quikstart"], ["did you mean quickstart"]),
        (["quickstart", "zero_stag=1"], ["zero_stag", "did you mean zero_stage"]),
        (["quickstart", "data.shards=/nowhere/shards"], ["/nowhere/shards", "python -m data_prep build"]),
    ],
)
def test_users_mistake_is_one_message_and_exit_code_two(arguments: list[str], parts: list[str]):
    """The last one comes up after all imports, whose own messages would show in a process that starts from nothing."""
    result = run(sys.executable, "train.py", *arguments) if "data" in arguments[-1] else train(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]


def test_a_teacher_that_does_not_exist_is_told_once_on_two_ranks(shards: Path, tmp_path: Path):
    recipe = tmp_path / "tec.yaml"
    method = (
        "method: {name: tec, encoder: {embed_dim: 64, depth: 3, num_heads: 2}, teacher: {name: test_vit, top_k: 3}}\n"
    )
    recipe.write_text(TINY_MAE[: TINY_MAE.index("method:")] + method + TINY_MAE[TINY_MAE.index("epochs:") :])
    overrides = (f"data.shards={shards}", f"output={tmp_path / 'run'}", "method.teacher.checkpoint=/nowhere/ibot.pth")
    ranks = forked.run_ranks(2, ["train.py", recipe, *overrides], ROOT)
    told = [line for rank in ranks for line in rank.stderr.splitlines() if "ibot.pth" in line]
    assert told == [
        "ummim: error: method.teacher.checkpoint = '/nowhere/ibot.pth': cannot be read: No such file or directory; "
        "name the file of the teacher's weights, or untrained for a trial"
    ]
    assert [rank.returncode for rank in ranks] == [2, 2]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("method.decoder.depth=2", "another model"),
        ("throw_ratio=0", "another model"),  # the aggregation is part of the model
        ("global_batch=4", "set global_batch=8"),
    ],
)
def test_changed_recipe_in_the_same_folder_is_refused(change: str, part: str, undisturbed: Path):
    before = (undisturbed / "recipe.yaml").read_text()
    result = train(undisturbed / "recipe.yaml", change)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert part in result.stderr
    assert "name another output" in result.stderr
    assert (undisturbed / "recipe.yaml").read_text() == before


def test_a_method_of_the_users_own_trains_and_draws(shards: Path, tmp_path: Path):
    recipe = tmp_path / "ninth.yaml"
    text = TINY_MAE.replace("name: mae", "name: tests.methods.ninth\n  radius: 6").replace("SHARDS", str(shards))
    recipe.write_text(text + f"throw_ratio: 0.5\noutput: {tmp_path / 'run'}\n")
    result = train(recipe)
    assert result.returncode == 0, result.stderr
    assert len(losses(tmp_path / "run")) == 12
    assert list((tmp_path / "run" / "reconstructions").glob("*.png"))


def test_one_compiled_graph_trains_as_the_eager_one_does(shards: Path, tmp_path: Path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY_MAE.replace("SHARDS", str(shards)))
    small = ("max_steps=2", "figure_every=0", "method.encoder.depth=1")
    for name in ("eager", "compiled"):
        result = train(recipe, f"output={tmp_path / name}", f"compile={name == 'compiled'}", *small)
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    assert train(recipe, "compile=true", "zero_stage=3", "--dry-run").returncode == 2
