"""Kills, signals and bad numbers, with real processes: nothing is lost that a checkpoint held."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from tests.engine.conftest import command, environment, losses, records, run, run_ranks
from ummim.data.faults import Fault
from ummim.engine import checkpoint, resume
from ummim.engine.faults import EXIT_INTERRUPT, EXIT_PREEMPTED, Interrupts, agree, on_every_rank
from ummim.engine.zero import World
from ummim.errors import DataError


def test_a_run_killed_on_two_ranks_goes_on_bit_for_bit(tmp_path, two_ranks):
    """kill -9 of one rank in step 7, then the same command again."""
    recipe = {"output": str(tmp_path), "zero_stage": 2, "checkpoint_every": 4}
    killed = run(2, "job", {"recipe": recipe, "fault": {"step": 6, "signal": "SIGKILL", "rank": 1}})
    assert killed.returncode != 0
    [message] = (line for line in killed.stderr.splitlines() if "was killed" in line)
    named = rf"ummim: rank 1 on {re.escape(socket.gethostname())} \(process \d+\) was killed or crashed in step 7"
    assert re.search(named, message)
    assert [p.name for p in checkpoint.steps(tmp_path / "checkpoints")] == ["step-4"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # as a kill in the middle of a write leaves it
    again = run_ranks(2, "job", {"recipe": recipe})
    assert [rank.returncode for rank in again] == [0, 0], again
    assert losses(tmp_path) == losses(two_ranks)
    assert [r["step"] for r in records(tmp_path)] == list(range(1, 11))
    ours, theirs = (folder / "checkpoints" / "step-10" / "model.safetensors" for folder in (tmp_path, two_ranks))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_signal_to_one_rank_stops_both_after_the_same_step(tmp_path, two_ranks):
    recipe = {"output": str(tmp_path), "zero_stage": 2}
    arguments = {"recipe": recipe, "fault": {"step": 3, "signal": "SIGUSR1", "rank": 1}}
    stopped = run_ranks(2, "job", arguments)
    assert [rank.returncode for rank in stopped] == [143, 143], stopped
    [step] = checkpoint.steps(tmp_path / "checkpoints")
    assert step.name == "step-4" and checkpoint.fault(step) is None
    assert losses(tmp_path) == {s: loss for s, loss in losses(two_ranks).items() if s <= 4}


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_names_itself_in_the_exit_code(tmp_path, name, code):
    job = run(1, "job", {"recipe": {"output": str(tmp_path)}, "fault": {"step": 2, "signal": name}})
    assert job.returncode == code, job.stderr
    assert [p.name for p in checkpoint.steps(tmp_path / "checkpoints")] == ["step-3"]
    assert "Traceback" not in job.stderr
    assert "stopped after step 3, saved" in job.stderr


def test_a_loss_that_is_not_a_number_ends_with_one_message(tmp_path):
    """The samples are those of the rank and micro-batch at fault; the step's weights are never saved."""
    recipe = {"output": str(tmp_path), "checkpoint_every": 2}
    ranks = run_ranks(2, "job", {"recipe": recipe, "fault": {"step": 3, "nan": True}})
    messages = [line for rank in ranks for line in rank.stderr.splitlines() if line.startswith("ummim: ")]
    assert len(messages) == 1 and "not finite at step 4 (samples: sample-26, sample-27)" in messages[0]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert [p.name for p in checkpoint.steps(tmp_path / "checkpoints")] == ["step-2"]


@pytest.fixture
def pythons_own_ctrl_c():
    """Python's answer to Ctrl-C, which a suite in the background is started without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("pythons_own_ctrl_c")
def test_the_first_ctrl_c_waits_and_its_echo_is_ignored():
    with Interrupts() as interrupts:
        assert interrupts.code == 0
        for _ in range(3):  # the terminal's, the launcher's
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.code == EXIT_INTERRUPT
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.code == EXIT_PREEMPTED
    with pytest.raises(KeyboardInterrupt):  # Python's own answer is back
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_second_ctrl_c_ends_the_process_at_once():
    program = (
        "import time; from ummim.engine import faults; faults.ECHO_SECONDS = 0.0\n"
        "with faults.Interrupts(): print('ready', flush=True); [time.sleep(0.1) for _ in range(600)]"
    )
    job = subprocess.Popen([sys.executable, "-c", program], env=environment(), stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None and job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert job.poll() is None
    job.send_signal(signal.SIGINT)
    assert job.wait(10) == -signal.SIGINT


def test_a_forked_worker_does_not_answer_for_the_run():
    with Interrupts() as interrupts:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(interrupts.code)
        assert os.waitpid(child, 0)[1] == 0
        assert interrupts.code == 0


def test_a_signal_that_comes_after_the_save_does_not_kill():
    """As where a scheduler signals each rank, and another one's signal has already made all of them save and leave."""
    child = os.fork()
    if child == 0:
        with Interrupts() as interrupts:
            interrupts.leave()
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_run_stopped_by_hand_goes_on(tmp_path):
    """A real SIGTERM from outside at a moment of its own choosing, then the same command."""
    arguments: dict[str, Any] = {"recipe": {"output": str(tmp_path)}, "plan": {"stop_step": 2000, "total_steps": 2000}}
    job = subprocess.Popen(command(1, "job", arguments), env=environment(), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "metrics.jsonl").exists() or not records_so_far(tmp_path):
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 143
    [step] = checkpoint.steps(tmp_path / "checkpoints")
    reached = resume.read_state(step).step
    assert 0 < reached < 2000 and records(tmp_path)[-1]["step"] == reached
    arguments["plan"]["stop_step"] = reached + 2
    again = run(1, "job", arguments)
    assert again.returncode == 0 and f"resuming {tmp_path} after step {reached}" in again.stderr
    assert [r["step"] for r in records(tmp_path)] == list(range(1, reached + 3))


def records_so_far(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:-1]]


def test_agreement_averages_the_loss_and_takes_the_graver_code(world):
    agreed = agree(torch.tensor(0.1), 0, [], True, world)
    assert agreed.loss == pytest.approx(0.1) and agreed[1:] == (0, 0, False, 1)
    assert agree(torch.tensor(0.1), EXIT_INTERRUPT, [], False, world).stop == EXIT_INTERRUPT
    assert agree(torch.tensor(0.1), EXIT_PREEMPTED, [], False, world).stop == EXIT_PREEMPTED


def test_agreement_counts_bad_samples_and_tells_of_a_lost_one(world):
    """Bad replacements of a bad sample are no further samples."""
    bad, worse, lost = (Fault(0, 1, "a", "k", 512, "torn", *end) for end in ((0, "b"), (1, "b"), (0, None)))
    assert agree(torch.tensor(0.1), 0, [bad, worse, bad], False, world)[2:] == (2, False, 0)
    assert agree(torch.tensor(0.1), 0, [bad, lost], False, world)[2:] == (2, True, 0)


@pytest.mark.parametrize(("rank", "mistaken", "told"), [(0, False, False), (1, True, True), (2, True, False)])
def test_the_first_rank_that_fails_by_a_users_mistake_tells_and_all_end(monkeypatch, rank, mistaken, told):
    """A file that ranks 1 and 2 of three cannot read."""

    def read() -> str:
        if mistaken:
            raise DataError("teacher.pth: cannot be read")
        return "weights"

    def gather(everywhere: list[bool], mine: bool) -> None:
        assert mine == mistaken
        everywhere[:] = [False, True, True]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(DataError if told else SystemExit, match="teacher" if told else "2"):
        on_every_rank(read, World(rank, rank, 3, torch.device("cpu")))


def test_what_every_rank_can_do_goes_on(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda everywhere, mine: None)
    assert on_every_rank(lambda: "weights", World(1, 1, 2, torch.device("cpu"))) == "weights"
