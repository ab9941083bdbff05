"""A bad step, run again alone."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TINY_MAE
from ummim.__main__ import main
from ummim.data import Batch
from ummim.masking import sample_seed
from ummim.recipe_file import dump_recipe, load_recipe


@pytest.fixture
def bundle(tmp_path, write_recipe):
    """What a run leaves of a step: three samples, the weights that met them, the recipe."""
    recipe = load_recipe(str(write_recipe(TINY_MAE)))
    torch.manual_seed(0)
    method = recipe.method.build(recipe.data.image_size, recipe.partial, False)
    keys, sampler = ["a", "b/1", "c"], recipe.sampler()
    plan = sampler.stack([sampler(sample_seed(0, 0, key)) for key in keys])
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    folder = tmp_path / "bad_steps" / "step-7"
    batch = Batch(images, plan, torch.zeros(3, dtype=torch.int64), keys)
    batch.save(folder / "rank-1-0.safetensors", {"step": 7, "rank": 1, "micro_batch": 0, "loss": "nan"})
    save_file({f"method.{name}": value for name, value in method.state_dict().items()}, folder / "model.safetensors")
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return folder


def test_losses_of_the_micro_batch_and_of_each_sample_are_told(bundle, capsys):
    assert main(["replay", str(bundle)]) == 0
    head, columns, *samples = capsys.readouterr().out.splitlines()
    assert head.startswith("step 7, rank 1, micro-batch 0: loss nan then, in fp32; ")
    assert columns.split()[:2] == ["sample", "loss"]
    losses = {line.split()[0]: float(line.split()[1]) for line in samples}
    assert set(losses) == {"a", "b/1", "c"}
    now = float(head.split("; ")[1].split()[0])
    assert now == pytest.approx(sum(losses.values()) / 3, rel=1e-4)
    assert list(losses.values()) == sorted(losses.values(), reverse=True)


def test_weights_that_an_earlier_step_has_spoilt_are_named(bundle, capsys):
    weights = load_file(bundle / "model.safetensors")
    weights["method.decoder.predict.bias" if "method.decoder.predict.bias" in weights else min(weights)].fill_(math.nan)
    save_file(weights, bundle / "model.safetensors")
    assert main(["replay", str(bundle)]) == 0
    assert "not finite before the step" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("name", ["recipe.yaml", "model.safetensors", "rank-1-0.safetensors"])
def test_a_file_that_is_missing_or_cut_is_one_message(bundle, capsys, name):
    path = bundle / name
    path.write_bytes(path.read_bytes()[:40] if name != "recipe.yaml" else b"nothing: here\n")
    assert main(["replay", str(bundle)]) == 2
    assert name in capsys.readouterr().err


def test_a_run_wants_a_step_and_another_folder_is_refused(bundle, tmp_path, capsys):
    shutil.rmtree(bundle)
    assert main(["replay", str(tmp_path)]) == 2
    assert "--step" in capsys.readouterr().err
