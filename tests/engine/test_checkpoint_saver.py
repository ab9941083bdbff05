"""Checkpoints written while training goes on: of the step they name, in place in the end, or not at all."""

import errno
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.conftest import losses, records, run
from tests.engine.toy import ToyPlan, ToyRecipe, build_toy, toy_batches
from ummim.engine import checkpoint, checkpoint_saver
from ummim.engine.trainer import train
from ummim.errors import CheckpointError

PLAN = ToyPlan(world_size=1, stop_step=6)
RANK_FILE = "rank-00000-of-00001.safetensors"


def go(world, output, at=lambda step: None, **changes):
    """Six steps; ``at(step)`` runs when the batches of step 0, 1, ... are asked for."""
    recipe = ToyRecipe(**{"output": str(output), "checkpoint_every": 2, "zero_stage": 2, **changes})

    def batches(done):
        for index, batch in enumerate(toy_batches(PLAN, 0, done)):
            at(done + index // PLAN.accumulation)
            yield batch

    return train(build_toy(), recipe, PLAN, world, "digest", batches)


def present(output):
    return sorted(path.name for path in (output / "checkpoints").glob("*") if path.name != "latest")


@pytest.fixture(scope="module")
def waited(world, tmp_path_factory):
    """A run that waits for its checkpoints."""
    output, seen = tmp_path_factory.mktemp("waited"), []
    go(world, output, lambda step: seen.append(present(output)), checkpoint_async=False)
    assert seen[2 * PLAN.accumulation] == ["step-2"]
    return output


def test_training_goes_on_while_a_checkpoint_is_written_and_changes_nothing_in_it(world, tmp_path, waited, monkeypatch):
    """Step 2's file is held back until the batches of the fourth step are asked for."""
    write, begin = checkpoint_saver.write_rank_file, threading.Event()
    seen = {}

    def held_back(path, tensors, told):
        begin.wait()
        return write(path, tensors, told)

    def at(step):
        seen[step] = present(tmp_path)
        if step == 3:
            begin.set()

    monkeypatch.setattr(checkpoint_saver, "write_rank_file", held_back)
    assert go(world, tmp_path, at) == 0
    assert seen[2] == seen[3] == [".tmp-step-2"]
    assert present(tmp_path) == ["step-2", "step-4", "step-6"]
    for step in ("step-2", "step-4", "step-6"):
        ours, theirs = (folder / "checkpoints" / step for folder in (tmp_path, waited))
        mine, other = (load_file(step / RANK_FILE) for step in (ours, theirs))
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
        assert checkpoint.fault(ours) is None
    assert losses(tmp_path) == losses(waited)


def test_it_is_in_place_some_steps_later_and_not_only_at_the_end(world, tmp_path):
    seen = {}

    def at(step):
        if step in (3, 5):
            time.sleep(0.5)  # time to write, and to finish in the next step
        seen[step] = present(tmp_path)

    go(world, tmp_path, at, checkpoint_every=2)
    assert ".tmp-step-2" in seen[2] and "step-2" in seen[4]


@pytest.mark.parametrize("name", [RANK_FILE, "model.safetensors"])
def test_a_write_that_fails_ends_the_run_with_one_message(world, tmp_path, monkeypatch, name):
    save_file, calls = checkpoint.save_file, []

    def full(tensors, path, *rest):
        calls.append(path)
        if path.name == name and len(calls) >= 3:  # step-6 has both files
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_file(tensors, path, *rest)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step-6 could not be saved: disk full .*resumes from step-4"):
        go(world, tmp_path)
    assert present(tmp_path) == ["step-2", "step-4"]


def test_what_is_no_fault_of_the_disk_is_not_called_one(world, tmp_path, monkeypatch):
    def broken(*arguments):
        raise AssertionError("a mistake of ours")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(AssertionError, match="a mistake of ours"):
        go(world, tmp_path)


def test_a_write_that_fails_on_one_rank_ends_both(tmp_path):
    """Rank 1 may write no more than 100 kB to a file; its share has 190."""
    recipe = {"output": str(tmp_path), "zero_stage": 2, "checkpoint_every": 2}
    job = run(2, "job", {"recipe": recipe, "fault": {"step": 0, "file_limit": 100_000, "rank": 1}})
    [message] = [line for line in job.stderr.splitlines() if line.startswith("ummim: ")]
    assert "step-2 could not be saved: " in message and "File too large" in message and "no earlier one" in message
    assert "exitcode  : 2" in job.stderr
    assert present(tmp_path) == []


def test_a_kill_while_a_checkpoint_is_written_costs_that_checkpoint_only(world, tmp_path, waited):
    """kill -9 in step 6 while step 4's file is written; step-2 is what the same command goes on from."""
    recipe = {"output": str(tmp_path), "zero_stage": 2, "checkpoint_every": 2}
    plan = {"stop_step": 6, "world_size": 1}
    killed = run(1, "job", {"recipe": recipe, "plan": plan, "fault": {"step": 5, "signal": "SIGKILL", "slow_from": 4}})
    assert killed.returncode == -9
    assert present(tmp_path) == [".tmp-step-4", "step-2"]
    assert Path(tmp_path / "checkpoints" / ".tmp-step-4" / RANK_FILE).is_file()
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-2"
    assert go(world, tmp_path) == 0
    assert present(tmp_path) == ["step-2", "step-4", "step-6"]
    assert losses(tmp_path) == losses(waited) and [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5, 6]
