"""Runs' folders as training leaves them, made by hand in no time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import TINY_MAE
from tests.data.pictures import picture
from ummim.engine.checkpoint import seal
from ummim.recipe_file import dump_recipe, load_recipe

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Make ``tmp_path/NAME``: a run of ``recipe`` with two checkpoints, three figures and 24 of 32 steps logged."""

    def make(name: str = "run", recipe: str = TINY_MAE, steps: tuple[int, ...] = (8, 16)) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        source = tmp_path / f"{name}.yaml"
        source.write_text(recipe.replace("SHARDS", "gone"))
        typed = load_recipe(str(source))
        (folder / "recipe.yaml").write_text(dump_recipe(typed))
        write_metrics(folder, [record(step) for step in range(1, 25)])
        environment = {
            "git_commit": "0123456789abcdef+changes",
            "packages": {"torch": "2.14.1"},
            "world_size": 2,
            "shard_digest": "d1",
            "command": ["train.py", "tiny.yaml", "--local_rank=0", "name=two words"],
            "started": "2026-01-02T03:04:05+00:00",
        }
        (folder / "environment.json").write_text(json.dumps({**environment, "earlier": [environment]}))
        torch.manual_seed(0)
        method = typed.method.build(typed.data.image_size, typed.partial, typed.throw_ratio > 0)
        weights = {f"method.{key}": value for key, value in method.state_dict().items()}
        for step in steps:
            write_checkpoint(folder / "checkpoints" / f"step-{step}", weights, dump_recipe(typed))
        for epoch in (1, 2, 3):
            path = folder / "reconstructions" / f"epoch-{epoch:04d}.png"
            path.parent.mkdir(exist_ok=True)
            figure(epoch).save(path)
        return folder

    return make


def record(step: int, **more: Any) -> dict[str, Any]:
    """A line of metrics of a run with 8 steps an epoch."""
    rates = {"images_per_second": 100.0, "data_wait": 0.1, "peak_memory_mib": 500.0}
    where = {"step": step, "epoch": step / 8, "samples": 8 * step}
    return {**where, "loss": 2 / step, "lr": 1e-3, "grad_norm": 0.5, **rates, **more}


def write_metrics(folder: Path, records: list[dict[str, Any]], tail: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records) + tail)


def write_checkpoint(folder: Path, weights: dict[str, torch.Tensor], recipe: str) -> None:
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "state.json").write_text(json.dumps({"epoch": int(folder.name[5:]) / 8, "milestone": True}))
    seal(folder)


def figure(seed: int) -> Image.Image:
    """A picture of the shape of a reconstruction figure."""
    return picture(seed, (300, 200))
