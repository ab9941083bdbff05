"""Continued pre-training: ``train.py RECIPE init=...``."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY_MAE
from tests.forked import run
from tests.interop.exports import CHECKPOINT
from ummim.interop.export import export
from ummim.interop.run import load_run


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The bundled photographs, as shards."""
    built = run(["-m", "data_prep", "build", ROOT / "ummim" / "sample_images", tmp_path / "shards"], tmp_path)
    assert built.returncode == 0, built.stderr
    return tmp_path / "shards"


def test_a_run_starts_from_weights_once(write_recipe, shards: Path, tmp_path: Path):
    """A run that goes on from its own checkpoint does not need them; a fresh one says that they are not there."""
    recipe = write_recipe(TINY_MAE.replace("epochs: 4", "epochs: 1"), shards)
    train = [ROOT / "train.py", recipe]
    assert run(train, tmp_path).returncode == 0
    trained, method, _ = load_run(tmp_path / "run")
    start = export(trained, method, CHECKPOINT, tmp_path / "encoder.safetensors", "safetensors").path
    again = [*train, f"init={start}", f"output={tmp_path / 'again'}"]
    dry = run([*again, "--dry-run"], tmp_path)
    assert "tensors of exported encoder" in dry.stdout
    stopped = run([*again, "max_steps=2", "optim.warmup_epochs=0"], tmp_path)
    assert stopped.returncode == 0 and "init: 30 tensors of exported encoder" in stopped.stderr
    start.unlink()
    resumed = run([*again, "max_steps=3", "optim.warmup_epochs=0"], tmp_path)
    assert resumed.returncode == 0 and "init:" not in resumed.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    shutil.rmtree(tmp_path / "again")
    lacking = run(again, tmp_path)
    assert lacking.returncode == 2 and "no such file or folder" in lacking.stderr


def test_a_family_without_a_file_is_refused(write_recipe, tmp_path: Path):
    refused = run([ROOT / "train.py", write_recipe(TINY_MAE), "init_family=mae_vit", "--dry-run"], tmp_path)
    assert refused.returncode == 2 and "name the file as init" in refused.stderr
