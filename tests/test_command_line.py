"""``ummim``: recipes, show, export, reconstruct, from a run's folder."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from signal import SIGPIPE
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import TINY_MAE, TINY_UM_MAE
from ummim import catalogue, reconstruct
from ummim.__main__ import main
from ummim.engine.checkpoint import RunState, seal, write_rank_file
from ummim.engine.checkpoint_shards import header, rank_file
from ummim.interop.run import load_run
from ummim.recipe_file import dump_recipe, load_recipe, packaged_recipes


@pytest.fixture(params=[TINY_MAE, TINY_UM_MAE], ids=["mae", "um_mae"])
def run(request: pytest.FixtureRequest, write_recipe, tmp_path: Path) -> Path:
    """A run's folder with one checkpoint of random weights."""
    return make_run(write_recipe(request.param), tmp_path / "run")


def make_run(recipe_file: Path, folder: Path) -> Path:
    recipe = load_recipe(str(recipe_file))
    method = recipe.method.build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)
    checkpoint = folder / "checkpoints" / "step-3"
    checkpoint.mkdir(parents=True)
    save_file({f"method.{key}": value for key, value in method.state_dict().items()}, checkpoint / "model.safetensors")
    (checkpoint / "recipe.yaml").write_text(dump_recipe(recipe))
    seal(checkpoint)
    return folder


def picture(path: Path, size: tuple[int, int] = (90, 70)) -> Path:
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


def test_recipes_lists_every_packaged_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    status = {"status": "rehearsed", "version": "0.1.0", "commit": "c" * 40, "date": "2026-01-02"}
    monkeypatch.setattr(catalogue, "read_status", lambda: {"um_mae_swin_base_200e": status})
    assert main(["recipes"]) == 0
    _, header, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[: len(packaged_recipes())]] == packaged_recipes()
    for name, parts in {
        "pr_mae_vit_large_800e": ["mae", "ViT-L/16", "800", "50%", "85.4", "PR-MIM, table 3", "planned", "17.92", "87%",
                                  "finetune_mae_vit_large_800e"],
        # published nowhere
        "um_mae_swin_base_200e": ["um_mae", "Swin-B", "200", "rehearsed 2026-01-02 (0.1.0, cccccccc)", "6.92",
                                  "finetune_um_mae_swin_tiny_200e"],
    }.items():  # fmt: skip
        row = next(row for row in rows if row.startswith(f"{name} "))
        assert row.split() == [name, *" ".join(parts).split()]
        assert row.index(f" {parts[0]} ") + 1 == header.index("method")


def test_show_prints_a_recipe_that_loads(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["show", "pr_mae_vit_base_800e", "seed=4"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(str(tmp_path / "shown.yaml")) == load_recipe("pr_mae_vit_base_800e", ["seed=4"])


def test_exported_vit_loads_strictly_in_timm_with_equal_features(write_recipe, tmp_path: Path):
    run = make_run(write_recipe(TINY_MAE), tmp_path / "run")
    assert main(["export", str(run), str(tmp_path / "vit.safetensors")]) == 0
    model = timm.create_model(
        "vit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0,
        global_pool="token",
    )  # fmt: skip
    model.load_state_dict(load_file(tmp_path / "vit.safetensors"), strict=True)
    _, method, _ = load_run(run)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model.eval().forward_features(images)  # type: ignore[operator]
        torch.testing.assert_close(method.encoder(images), features, rtol=0, atol=1e-5)


def test_export_in_every_format(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for form, name in (("safetensors", "a.safetensors"), ("official", "sub/b.pth")):
        assert main(["export", str(run / "checkpoints" / "step-3"), str(tmp_path / name), "--format", form]) == 0
        assert (tmp_path / name).is_file()
    model = torch.load(tmp_path / "sub/b.pth", weights_only=True)["model"]
    assert "decoder_pred.weight" in model
    code = main(["export", str(run), str(tmp_path / "c.safetensors"), "--format", "timm"])
    assert code == (0 if "cls_token" in model else 2)  # timm has no twin of UM-MAE's Swin
    assert (tmp_path / "c.safetensors").exists() == (code == 0)
    if code:
        assert "official" in capsys.readouterr().err


def test_reconstruct_draws_a_row_per_image(run: Path, tmp_path: Path):
    files = [picture(tmp_path / "a.png"), picture(tmp_path / "b.jpg", (64, 200))]
    assert main(["reconstruct", str(run), *map(str, files), "--out", str(tmp_path / "out.png")]) == 0
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.mode == "RGB"
        assert sheet.width > 5 * 64
        assert sheet.height > 2 * 64


def test_reconstruct_compares_checkpoints_side_by_side(write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = [make_run(write_recipe(TINY_MAE), tmp_path / "full")]
    runs.append(
        make_run(write_recipe(TINY_MAE + "throw_ratio: 0.5\npartial: {aggregation: none}\n"), tmp_path / "plain")
    )
    arguments = ["reconstruct", str(runs[0]), str(picture(tmp_path / "a.png")), "--out", str(tmp_path / "out.png")]
    drawn: list[Any] = []
    draw = reconstruct.comparison_figure

    def drawing(*given: Any) -> Image.Image:
        drawn.append(given)
        return draw(*given)

    monkeypatch.setattr(reconstruct, "comparison_figure", drawing)
    assert main([*arguments, "--compare", str(runs[1]), str(runs[0])]) == 0
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.width == 6 + 7 * (160 + 6)  # the original, and plan and prediction of three
    [(_, models, title)] = drawn
    plans = [made.plan for _, made in models]
    assert all(plan.visible.equal(plans[0].visible) for plan in plans)  # the same patches are seen
    assert plans[1].thrown.shape[1] > plans[0].thrown.shape[1] == 0
    names = [name for name, _ in models]
    assert title == f"norm-pix, each patch's mean and contrast are the original's: {', '.join(names)}"


def test_a_figure_that_would_replace_a_folder_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "figures").mkdir()
    before = sorted(tmp_path.iterdir())
    arguments = ["reconstruct", str(run), str(picture(run / "image.png"))]
    assert main([*arguments, "--out", str(tmp_path / "figures")]) == 2
    assert f"{tmp_path}/figures: is a folder" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "ummim", "show", "quickstart"],
        ["-u", "-m", "ummim", "show", "quickstart"],
        ["train.py", "quickstart", "--dry-run"],
    ],
)
def test_a_reader_that_leaves_early_is_no_error_of_ours(words: list[str]):
    words = [sys.executable, *words]
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (128 + SIGPIPE, b"")


def test_reconstruct_refuses_to_compare_other_sizes(write_recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [make_run(write_recipe(TINY_MAE), tmp_path / "a")]
    runs.append(make_run(write_recipe(TINY_MAE.replace("image_size: 32", "image_size: 64")), tmp_path / "b"))
    arguments = ["reconstruct", str(runs[0]), str(picture(tmp_path / "a.png")), "--out", str(tmp_path / "out.png")]
    assert main([*arguments, "--compare", str(runs[1])]) == 2
    assert "64 pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["export", "/nowhere", "x"], ["/nowhere", "no such folder"]),
        (["show", "nope"], ["nope", "no packaged recipe"]),
    ],
)
def test_users_mistake_is_one_message(arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert all(part in printed for part in parts)
    assert printed.count("\n") == 1


def test_file_that_is_no_image_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "text.jpg").write_text("not a picture")
    assert main(["reconstruct", str(run), str(tmp_path / "text.jpg"), "--out", str(tmp_path / "o.png")]) == 2
    assert "text.jpg" in capsys.readouterr().err
    assert not (tmp_path / "o.png").exists()


def test_weights_that_do_not_fit_the_recipe_are_refused(run: Path, capsys: pytest.CaptureFixture[str]):
    weights = run / "checkpoints" / "step-3" / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop("method.embed.bias")
    save_file(tensors, weights)
    seal(weights.parent)
    assert main(["export", str(run), "/tmp/unused"]) == 2
    assert "embed.bias" in capsys.readouterr().err
    weights.write_bytes(weights.read_bytes()[:100])
    assert main(["export", str(run), "/tmp/unused"]) == 2
    assert "model.safetensors has 100 bytes" in capsys.readouterr().err


def test_damaged_newest_checkpoint_is_passed_over(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(run / "checkpoints" / "step-3", run / "checkpoints" / "step-5")
    assert load_run(run)[2].name == "step-5"
    (run / "checkpoints" / "step-5" / "model.safetensors").unlink()
    assert load_run(run)[2].name == "step-3"


def test_weights_are_read_from_the_ranks_files_where_there_is_no_other(run: Path, tmp_path: Path):
    """As in all checkpoints but milestones: here of three ranks, each with a third of every parameter."""
    step = run / "checkpoints" / "step-3"
    _, before, _ = load_run(run)
    (step / "model.safetensors").unlink()
    parameters = {f"method.{name}": p.detach().view(-1) for name, p in before.named_parameters() if p.requires_grad}
    others = {f"method.{name}": value for name, value in before.state_dict().items()}
    shapes = {name: list(others.pop(name).shape) for name in parameters}
    for rank in range(3):
        pieces = {name: flat.tensor_split(3)[rank] for name, flat in parameters.items()}
        starts = {name: sum(len(part) for part in flat.tensor_split(3)[:rank]) for name, flat in parameters.items()}
        tensors = {f"master/{name}@{starts[name]}": piece.clone() for name, piece in pieces.items() if len(piece)}
        tables: dict[str, dict[str, Any]] = {}
        if rank == 0:
            tensors.update({f"buffer/{name}": value for name, value in others.items()})
            tables = {"shapes": shapes, "aliases": {}}
        write_rank_file(step / rank_file(rank, 3), tensors, header(3, rank, 3, "layout", **tables))
    known = {field.name: 0 for field in fields(RunState)}
    (step / "state.json").write_text(json.dumps({**known, "step": 3, "layout": "layout"}))
    (step / "manifest.json").unlink()
    seal(step)
    after = load_run(run)[1].state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.state_dict().items())


def test_moved_step_folder_is_enough(run: Path, tmp_path: Path):
    step = (run / "checkpoints" / "step-3").rename(tmp_path / "kept")
    assert main(["export", str(step), str(tmp_path / "out.safetensors")]) == 0


def test_output_that_cannot_be_written_is_one_message(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert main(["export", str(run), str(tmp_path / "file" / "out.safetensors")]) == 2
    assert f"{tmp_path / 'file'}" in capsys.readouterr().err
