"""Checkpoints as files: whole or passed over by name, safe to load, refused where they do not fit."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.engine.conftest import command, execute, losses, records
from tests.engine.toy import ToyPlan, ToyRecipe, build_toy, toy_batches
from ummim.engine import checkpoint, resume
from ummim.engine.trainer import train
from ummim.errors import CheckpointError

PLAN = ToyPlan(world_size=1, stop_step=6)


def go(world, output, plan=PLAN, digest="digest", **changes):
    recipe = ToyRecipe(**{"output": str(output), "checkpoint_every": 2, "zero_stage": 2, **changes})
    return train(build_toy(), recipe, plan, world, digest, lambda done: toy_batches(plan, 0, done))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A finished run with step-2, step-4 and step-6."""
    output = tmp_path_factory.mktemp("finished")
    (output / "recipe.yaml").write_text("name: toy\n")
    assert go(world, output) == 0
    return output


@pytest.fixture
def output(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


FILES = (
    "manifest.json",
    "state.json",
    "model.safetensors",
    "recipe.yaml",
    "rank-00000-of-00001.safetensors",
)


def test_a_checkpoint_holds_these_files_and_latest_names_it(finished):
    folder = finished / "checkpoints"
    assert sorted(p.name for p in (folder / "step-6").iterdir()) == sorted(FILES)
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-2", "step-4", "step-6"]
    assert (folder / "latest").read_text() == "step-6"
    state = resume.read_state(folder / "step-6")
    assert (state.step, state.epoch, state.samples) == (6, 1.5, 24)


@pytest.mark.parametrize("name", FILES)
def test_without_any_one_file_the_previous_checkpoint_is_used_and_named(output, caplog, name):
    (output / "checkpoints" / "step-6" / name).unlink()
    with caplog.at_level(logging.WARNING):
        assert resume.newest_valid(output / "checkpoints") == output / "checkpoints" / "step-4"
    assert caplog.messages == [f"step-6: missing {name}; using step-4"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_or_a_cut_is_found(output, name):
    path = output / "checkpoints" / "step-6" / name
    good = path.read_bytes()
    middle = len(good) // 2
    for bad in (good[:middle], b"", good[:middle] + bytes([good[middle] ^ 0x80]) + good[middle + 1 :]):
        path.write_bytes(bad)
        assert name in str(checkpoint.fault(path.parent))


@pytest.mark.parametrize("text", ["[]", '{"files": []}', '{"files": {"state.json": 3}}', "{}"])
def test_a_manifest_of_another_shape_is_a_fault(output, text):
    (output / "checkpoints" / "step-6" / "manifest.json").write_text(text)
    assert "manifest.json cannot be used" in str(checkpoint.fault(output / "checkpoints" / "step-6"))


def test_losing_the_newest_and_running_again_gives_the_same_losses(world, output, caplog):
    before = losses(output)
    (output / "checkpoints" / "step-6" / "state.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert go(world, output) == 0
    assert "step-6: missing state.json; using step-4" in caplog.text
    assert losses(output) == before and [r["step"] for r in records(output)] == [1, 2, 3, 4, 5, 6]
    assert checkpoint.fault(output / "checkpoints" / "step-6") is None


def test_a_finished_run_is_left_as_it_is(world, output):
    before = (output / "metrics.jsonl").read_text()
    assert go(world, output) == 0
    assert (output / "metrics.jsonl").read_text() == before


def test_no_whole_checkpoint_is_an_error_and_not_a_fresh_start(output):
    for step in checkpoint.steps(output / "checkpoints"):
        (step / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="step-6: missing manifest.json; step-4: .*name another output"):
        resume.find("auto", output)


def test_steps_are_ordered_as_numbers_and_strangers_are_ignored(tmp_path):
    for name in ("step-9", "step-100", "step-20", "step-x", ".tmp-step-200", "stepper"):
        (tmp_path / name).mkdir()
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-100", "step-20", "step-9"]


def test_only_the_newest_are_kept_and_leftovers_go(world, tmp_path):
    torn = tmp_path / "checkpoints" / ".tmp-step-2"
    torn.mkdir(parents=True)
    (torn / "half.pt").write_bytes(b"half")
    go(world, tmp_path, keep_checkpoints=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-4", "step-6"]


def test_zero_keeps_all_checkpoints(world, tmp_path):
    go(world, tmp_path, keep_checkpoints=0, checkpoint_every=1)
    assert [int(step.name[5:]) for step in checkpoint.steps(tmp_path / "checkpoints")] == [6, 5, 4, 3, 2, 1]


def test_milestones_are_saved_whole_and_stay(world, tmp_path):
    """An epoch is four steps."""
    go(world, tmp_path, keep_checkpoints=1, checkpoint_every=3, milestone_every=1, plan=replace(PLAN, stop_step=9))
    folder = tmp_path / "checkpoints"
    assert [step.name for step in checkpoint.steps(folder)] == ["step-9", "step-8", "step-4"]
    assert resume.read_state(folder / "step-4").milestone and not resume.read_state(folder / "step-9").milestone
    assert all((step / "model.safetensors").is_file() for step in checkpoint.steps(folder))
    go(world, tmp_path, keep_checkpoints=1, checkpoint_every=1, plan=replace(PLAN, stop_step=11))
    assert [step.name for step in checkpoint.steps(folder)] == ["step-11", "step-8", "step-4"]


def test_files_are_as_readable_as_others(finished):
    modes = {path.stat().st_mode for path in (finished / "checkpoints" / "step-6").iterdir()}
    assert len(modes) == 1


def test_resume_never_starts_anew_and_loses_nothing(world, output, caplog):
    first = losses(output)
    (output / "shards").mkdir()  # not the run's
    (output / "data_faults-1.jsonl").write_text("{}\n")
    for number in (1, 2):
        assert go(world, output, resume="never") == 0
        assert f"moved to {output / f'before-{number}'}" in caplog.text
    for folder in (output, output / "before-1", output / "before-2"):
        assert losses(folder) == first
        assert checkpoint.fault(folder / "checkpoints" / "step-6") is None
    assert (output / "shards").is_dir()
    assert (output / "before-1" / "data_faults-1.jsonl").is_file()
    assert not (output / "data_faults-1.jsonl").exists()


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/step-4"])
def test_a_path_names_a_step_a_run_or_its_checkpoints(output, tmp_path, where):
    step = "step-4" if "step" in where else "step-6"
    assert resume.find(str(output / where), tmp_path / "new") == output / "checkpoints" / step


def test_a_run_can_go_on_in_another_folder(world, output, tmp_path):
    assert go(world, tmp_path / "new", resume=str(output / "checkpoints" / "step-4")) == 0
    assert losses(tmp_path / "new") == {s: loss for s, loss in losses(output).items() if s > 4}


def test_a_path_to_nothing_is_refused(output, tmp_path):
    for path in (tmp_path / "absent", tmp_path / "absent" / "step-3"):
        with pytest.raises(CheckpointError, match="absent"):
            resume.find(str(path), tmp_path / "new")


def test_a_path_to_an_earlier_step_goes_back_there_and_loses_nothing(world, output):
    first = losses(output)
    step = output / "checkpoints" / "step-4"
    assert resume.find(str(step), output) == step
    assert [p.name for p in resume.steps(output / "checkpoints")] == ["step-4", "step-2"]
    assert (output / "before-1" / "step-6").is_dir()
    assert go(world, output) == 0
    assert losses(output) == first


def test_the_same_command_goes_on_from_a_path_and_then_from_its_own_checkpoints(world, output, tmp_path, caplog):
    new, origin = tmp_path / "new", str(output / "checkpoints" / "step-2")
    assert go(world, new, resume=origin) == 0
    assert resume.find(origin, new) == new / "checkpoints" / "step-6"
    assert "has gone on from there" in caplog.text


def test_the_recipes_optimizer_settings_win_over_the_checkpoints(world, output):
    from ummim.engine.optim import OptimConfig

    before = losses(output)
    (output / "checkpoints" / "step-6").rename(output / "aside")
    assert go(world, output, optim=OptimConfig(base_lr=1e-3, warmup_epochs=1, betas=(0.5, 0.6), weight_decay=0.9)) == 0
    after = losses(output)
    assert [after[s] for s in (1, 2, 3, 4, 5)] == [before[s] for s in (1, 2, 3, 4, 5)]
    assert after[6] != before[6]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed=0, this run 1: set seed=0"),
        ({"plan": replace(PLAN, micro_batch=1)}, "global_batch=4, this run 2: set global_batch=4"),
        ({"digest": "other"}, "index_digest=digest, this run other: use the shards"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_remedy(world, output, change, said):
    with pytest.raises(CheckpointError, match=said):
        go(world, output, **change)


def mend(folder):
    """Make the manifest agree with whatever lies in the folder."""
    (folder / "manifest.json").unlink()
    checkpoint.seal(folder)


def rank_file_of(step, **changes):
    """A step folder's rank file written again, its header changed and the tensors named in ``drop`` left out."""
    drop = changes.pop("drop", ())
    path = step / "rank-00000-of-00001.safetensors"
    with safe_open(path, framework="pt") as file:
        told = {**file.metadata(), **changes}
    save_file({key: tensor for key, tensor in load_file(path).items() if key not in drop}, path, told)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda step: shutil.copy(next(step.parent.glob("step-4/rank*")), step), "this checkpoint .step 4, not 6"),
        (lambda step: rank_file_of(step, layout="another"), "not of this checkpoint .layout another, not "),
        (lambda step: rank_file_of(step, world_size="2"), "not of this checkpoint .world_size 2, not 1"),
        (lambda step: next(step.glob("rank*")).rename(step / "rank-00001-of-00002.safetensors"), "has 1 of 2 rank"),
        (lambda step: rank_file_of(step, rank="1"), "not of this checkpoint .rank 1, not 0"),
        (lambda step: rank_file_of(step, format="x"), "not of this checkpoint .format x, not "),
        (lambda step: rank_file_of(step, drop=["exp_avg/head.bias@0"]), "exp_avg of head.bias is not whole"),
        (lambda step: next(step.glob("rank*")).unlink(), "holds no rank files"),
        (lambda step: next(step.glob("rank*")).write_bytes(b"junk" * 99), "cannot be read"),
        (lambda step: torch.save({"a": 1}, next(step.glob("rank*"))), "cannot be read"),
    ],
    ids=["of another step", "of another model", "of more ranks", "one of two", "of another rank", "of another format",
         "with a hole", "missing", "junk", "a pickle"],
)  # fmt: skip
def test_a_rank_file_that_does_not_belong_is_refused_even_with_a_matching_manifest(world, output, spoil, said):
    step = output / "checkpoints" / "step-6"
    spoil(step)
    mend(step)
    with pytest.raises(CheckpointError, match=said):
        go(world, output)


def test_a_checkpoint_of_an_earlier_version_is_named_as_such(world, output):
    step = output / "checkpoints" / "step-6"
    for path in step.glob("rank-*"):
        path.rename(step / "mp_rank_00_model_states.pt")
    mend(step)
    with pytest.raises(CheckpointError, match="step-6 is DeepSpeed's, as earlier versions saved it: finish its run"):
        go(world, output)


def test_the_weights_need_no_deepspeed(finished):
    weights = load_file(finished / "checkpoints" / "step-6" / "model.safetensors")
    task = build_toy(seed=5)
    task.load_state_dict(weights, strict=True)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert not (finished / "checkpoints" / "step-4" / "model.safetensors").exists()


@pytest.mark.parametrize("kib", [1200, 1550])
def test_a_full_disk_ends_with_one_message_and_no_half_checkpoint(tmp_path, kib):
    """On a tmpfs of its own with room for two checkpoints: the third breaks at the rank's file or at the weights."""
    arguments = {"recipe": {"output": str(tmp_path), "checkpoint_every": 2}, "plan": {"stop_step": 6}}
    script = 'mount -t tmpfs -o size="$0"k none "$1" && shift && { "$@"; echo "code $?"; find "$OUT" -path "*step*"; }'
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(kib), str(tmp_path)]
    job = execute([*words, *command(1, "job", arguments)], OUT=str(tmp_path))
    assert "code 2" in job.stdout, job.stdout + job.stderr
    [message] = [line for line in job.stderr.splitlines() if line]
    assert message.startswith("ummim: error: ") and "step-6 could not be saved: disk full" in message
    assert "the same command resumes from step-4" in message
    kept = [
        line.removeprefix(f"{tmp_path}/checkpoints/") for line in job.stdout.splitlines() if "/checkpoints/" in line
    ]
    assert {line.split("/")[0] for line in kept} == {"step-2", "step-4"} and len(kept) == 2 * 4


def test_the_state_of_a_run_is_plain_json(finished):
    state = json.loads((finished / "checkpoints" / "step-6" / "state.json").read_text())
    assert 0 < state.pop("loss_mean") < 2
    assert len(state.pop("layout")) == 64
    assert state == {
        "step": 6, "epoch": 1.5, "samples": 24, "recipe": "toy", "world_size": 1, "zero_stage": 2,
        "precision": "fp32", "global_batch": 4, "seed": 0, "index_digest": "digest", "milestone": False,
        "optimizer": {"adam_steps": 6, "skipped_steps": 0, "loss_scaler": None}, "loss_count": 6,
    }  # fmt: skip
