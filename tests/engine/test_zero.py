"""DeepSpeed's configuration, activation checkpointing, and starts under each launcher."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import execute, losses, run
from tests.engine.toy import ToyPlan, ToyRecipe, build_toy, toy_batches
from ummim.engine import zero
from ummim.engine.optim import OptimConfig
from ummim.errors import RecipeError, UserError

KINDS = ("torch", "deepspeed", "fairscale", "fairscale_offload")


@pytest.mark.parametrize("stage", range(4))
def test_the_recipe_fills_in_every_number(stage):
    recipe = ToyRecipe(zero_stage=stage, precision="bf16", optim=OptimConfig(clip_grad=5.0))
    config = zero.deepspeed_config(recipe, ToyPlan())
    assert config["zero_optimization"]["stage"] == stage
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (8, 2)
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (2, 5.0)
    assert config["bf16"] == {"enabled": True} and "fp16" not in config


def test_the_packaged_files_hold_strategy_only():
    files = sorted(zero.config_folder().glob("*.json"))
    offloading = ["zero2_offload", "zero3_nvme", "zero3_offload"]
    assert [f.stem for f in files] == sorted([f"zero{stage}" for stage in range(4)] + offloading)
    for file in files:
        assert not zero.OWNED.keys() & json.loads(file.read_text()).keys()


@pytest.mark.parametrize("key", zero.OWNED)
def test_a_number_in_both_places_is_refused_by_name(tmp_path, key):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({key: 8, "zero_optimization": {"stage": 1}}))
    with pytest.raises(RecipeError, match=rf"mine\.json sets '{key}'.*{zero.OWNED[key]}"):
        zero.deepspeed_config(ToyRecipe(zero_stage=1, ds_config=str(path)), ToyPlan())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"zero_optimization": {"stage": 3}}', "sets stage 3, the recipe zero_stage=1"),
        (
            '{"zero_optimization": {"offload_param": {"device": "nvme"}}}',
            "offload_param.device=nvme: .* use cpu",
        ),
        ('{"zero_optimization": {"offload_param": {"device": "cpu"}}}', "offload_param: that takes zero_stage=3"),
        ("{", "is not JSON"),
        ("[1]", "must hold a JSON object"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, text, said):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(RecipeError, match=said):
        zero.deepspeed_config(ToyRecipe(zero_stage=1, ds_config=str(path)), ToyPlan())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="absent.json"):
        zero.deepspeed_config(ToyRecipe(ds_config=str(tmp_path / "absent.json")), ToyPlan())


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_keeps_names_and_recomputes(kind, world):
    plain, task = build_toy(dropout=0.0), build_toy(dropout=0.0)
    names = list(task.state_dict())
    zero.apply_activation_checkpointing(task.blocks(), kind)
    assert list(task.state_dict()) == names
    calls = []
    task.get_submodule("vit.blocks.0.norm1").register_forward_hook(lambda *_: calls.append(1))
    batch = next(toy_batches(ToyPlan(), 0))
    task(batch).loss.backward()
    plain(batch).loss.backward()
    assert len(calls) == 2
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(task.get_parameter(name).grad, parameter.grad, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_on_a_frozen_input_keeps_its_gradients(kind, world):
    task = build_toy(dropout=0.0)
    for parameter in (*task.vit.patch_embed.parameters(), task.vit.cls_token, task.vit.pos_embed):
        parameter.requires_grad_(False)
    zero.apply_activation_checkpointing(task.blocks(), kind)
    task(next(toy_batches(ToyPlan(), 0))).loss.backward()
    assert task.get_parameter("vit.blocks.0.attn.qkv.weight").grad is not None


def test_an_unknown_kind_is_refused():
    with pytest.raises(RecipeError, match="fairscale_offload"):
        zero.apply_activation_checkpointing([], "all")


def test_a_precision_the_device_lacks_is_refused(world, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False, raising=False)
    with pytest.raises(UserError, match="precision=fp16: this cpu cannot; use bf16 or fp32"):
        zero.initialize(build_toy(), ToyRecipe(precision="fp16"), ToyPlan(world_size=1))


def test_half_a_rendezvous_is_refused(alone, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="WORLD_SIZE"):
        zero.setup_distributed()


def test_a_first_start_needs_no_compiler_and_heeds_no_stale_lock(tmp_path):
    """No g++, no ninja, locks of a killed start: even CPU offload trains, and nothing is built."""
    extensions, empty = tmp_path / "extensions", tmp_path / "bin"
    empty.mkdir()
    for operator in ("deepspeed_shm_comm", "cpu_adam", "fused_adam", "utils"):
        (extensions / operator).mkdir(parents=True)
        (extensions / operator / "lock").touch()
    offload = str(zero.config_folder() / "zero3_offload.json")
    arguments = {
        "recipe": {"output": str(tmp_path / "run"), "zero_stage": 3, "ds_config": offload},
        "plan": {"stop_step": 2},
    }
    job = run(1, "job", arguments, PATH=str(empty), TORCH_EXTENSIONS_DIR=str(extensions), CC="", CXX="")
    assert job.returncode == 0, job.stderr
    assert len(losses(tmp_path / "run")) == 2
    assert {p.name for p in extensions.rglob("*") if p.is_file()} == {"lock"}
    assert "WARNING" not in job.stdout and "Warning" not in job.stderr


def test_deepspeeds_launcher_runs_the_same_job_on_two_ranks(tmp_path, two_ranks):
    """The same losses as without a launcher, to the bit."""
    launcher = Path(sys.executable).with_name("deepspeed")
    arguments = json.dumps({"recipe": {"output": str(tmp_path / "run"), "zero_stage": 2}})
    options = ["--num_accelerators", "2", "--master_port", "29731", "--module", "tests.engine.job"]
    job = execute([str(launcher), *options, arguments])
    assert job.returncode == 0, job.stderr
    assert losses(tmp_path / "run") == losses(two_ranks)
