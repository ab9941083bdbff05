"""Ranks and launchers that are killed, stopped or hang: one message names them, and no process is left.

Most cases run ranks without torch (``watched.py``), all at once; the last ones run the toy job under both launchers.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.conftest import losses
from tests.engine.processes import HANG, Group, two_ranks
from ummim.engine import checkpoint
from ummim.engine.watchdog import AGREE, FIRST, FORWARD, READ, SAVE, SLOW, Watchdog

RENDEZVOUS = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
# name: fault of rank 1 at step 4, or what is done to a process at step 4
CASES = ("done", "sleep", "gil", "error", "refuse", "kill-0", "kill-1", "stop-0", "stop-all",
         "guardian-0", "guardian-1", "launcher")  # fmt: skip
LAUNCHER = """
import json, os, subprocess, sys
ranks = [subprocess.Popen(words, env={**os.environ, "RANK": str(rank)})
         for rank, words in enumerate(json.loads(sys.argv[1]))]
[rank.wait() for rank in ranks]
"""


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Group]]:
    """All cases, started at once, each with its fault."""
    started = {}
    for name in CASES:
        folder = tmp_path_factory.mktemp(name)
        commands = two_ranks(folder, name if "-" not in name else "", steps=30 if name == "done" else 100_000)
        if name == "launcher":
            commands = [[sys.executable, "-c", LAUNCHER, json.dumps(two_ranks(folder))]]
        extra = {"TORCHELASTIC_RUN_ID": "x"} if name == "launcher" else {}
        started[name] = Group(folder, commands, **RENDEZVOUS, **extra)
    try:
        for name, group in started.items():
            strike(name, group)
        yield started
    finally:
        for group in started.values():
            group.kill()


def strike(name: str, group: Group) -> None:
    """Do what the case's name says."""
    kind, _, rank = name.partition("-")
    if kind not in ("kill", "stop", "guardian", "launcher"):
        return
    group.wait_for(lambda: (group.folder / "step-4-0").exists() and (group.folder / "step-4-1").exists())
    pids = {int(path.name[4:]): int(path.read_text()) for path in group.folder.glob("pid-*")}
    if kind == "kill":
        os.kill(pids[int(rank)], signal.SIGKILL)
    elif kind == "stop":
        for pid in pids.values() if rank == "all" else [pids[int(rank)]]:
            os.kill(pid, signal.SIGSTOP)
    elif kind == "guardian":
        [pid] = [p for p, c in group.processes().items() if "-m ummim.engine.guardian" in c and f'"rank": {rank},' in c]
        os.kill(pid, signal.SIGKILL)
    else:
        group.started[0].kill()


def test_ranks_that_end_well_end_quietly(groups):
    groups["done"].wait_until_gone()
    assert groups["done"].codes() == [0, 0]
    assert groups["done"].output() == ""
    assert not list(groups["done"].folder.glob("stacks-*"))


@pytest.mark.parametrize(("case", "code"), [("sleep", 1), ("gil", -signal.SIGKILL)])
def test_a_rank_that_hangs_is_named_with_its_place(groups, case, code):
    """Also one in C code that lets no other thread run."""
    group = groups[case]
    group.wait_until_gone()
    [message] = group.messages()
    assert "rank 1 on" in message and "hangs in step 4 (reading data) at" in message
    assert f"watched.py:{line_of(case)} suffer" in message and "hang_seconds" in message
    assert group.codes() == [1, code]
    stacks = [(group.folder / f"stacks-{rank}.txt").read_text() for rank in range(2)]
    assert "in agree" in stacks[0] and "in suffer" in stacks[1]


def line_of(case: str) -> int:
    lines = Path(__file__).with_name("watched.py").read_text().splitlines()
    return 1 + next(
        n for n, line in enumerate(lines) if ("time" if case == "sleep" else "None)") + ".sleep(3600)" in line
    )


def test_an_error_of_one_rank_ends_the_others_without_a_traceback(groups):
    groups["error"].wait_until_gone()
    [message] = groups["error"].messages()
    assert "rank 1 on" in message and "failed in step 4 (reading data): KeyError: 'blocks.0.weight'" in message
    assert groups["error"].output().count("Traceback") == 1
    assert groups["error"].codes() == [1, 1]


def test_a_users_mistake_on_one_rank_is_told_once(groups):
    groups["refuse"].wait_until_gone()
    [message] = groups["refuse"].messages()
    assert "rank 1 on" in message and "ended in step 4 (reading data) by an error of its own" in message
    assert "ummim: rank 1: error: shards: they are gone" in groups["refuse"].output()
    assert groups["refuse"].codes() == [1, 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named(groups, rank):
    group = groups[f"kill-{rank}"]
    group.wait_until_gone()
    [message] = group.messages()
    assert f"rank {rank} on" in message and "was killed or crashed in step" in message
    assert "Traceback" not in group.output()
    assert group.codes()[rank] == -signal.SIGKILL and group.codes()[1 - rank] == 1


def test_a_stopped_rank_is_killed(groups):
    groups["stop-0"].wait_until_gone()
    [message] = groups["stop-0"].messages()
    assert "rank 0 on" in message and "is stopped (SIGSTOP) in step" in message
    assert groups["stop-0"].codes() == [-signal.SIGKILL, 1]


def test_where_all_ranks_are_stopped_they_may_go_on(groups):
    """Ctrl-Z: longer than a rank may hang."""
    group = groups["stop-all"]
    time.sleep(HANG + 2)
    assert group.messages() == [] and len(group.processes()) == 4
    reached = len(list(group.folder.glob("step-*")))
    for process in group.started:
        process.send_signal(signal.SIGCONT)
    group.wait_for(lambda: len(list(group.folder.glob("step-*"))) > reached + 20)
    for process in group.started:
        process.terminate()
    group.wait_until_gone()
    assert group.codes() == [143, 143] and group.messages() == []


def test_a_rank_ends_with_its_guardian(groups):
    group = groups["guardian-1"]
    group.wait_until_gone()
    assert any("rank 1 on" in told and "its guardian process was killed" in told for told in group.messages())
    assert group.codes()[1] == 1 and group.codes()[0] == 1


def test_ranks_end_that_no_longer_reach_the_first_ones_guardian(groups):
    group = groups["guardian-0"]
    group.wait_until_gone()
    assert any("rank 0 on" in told and "its guardian process was killed" in told for told in group.messages())
    assert group.codes() == [1, 1]


def test_a_launchers_death_asks_its_ranks_to_save(groups):
    groups["launcher"].wait_until_gone()
    [message] = groups["launcher"].messages()
    assert "the launcher of rank 0 on" in message and "is gone in step" in message


def test_phases_may_take_longer_at_first_and_where_they_do_on_average(monkeypatch):
    data = SimpleNamespace(shards="https://server/shards", retry_seconds=300)
    recipe: Any = SimpleNamespace(hang_seconds=10, compile=False, data=data, output="run")
    watchdog = Watchdog(recipe, SimpleNamespace(rank=0, size=1))  # type: ignore[arg-type]
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def limit(step, phase, seconds):
        watchdog.beat(step, phase)
        clock[0] += seconds
        return watchdog._limit()

    assert limit(7, FORWARD, 1000.0) == 10 * FIRST
    assert limit(8, READ, 1.0) == 310
    assert limit(8, FORWARD, 6.0) == 10
    assert limit(8, AGREE, 1.0) == 10
    assert limit(9, FORWARD, 1.0) == SLOW * 6
    assert limit(9, SAVE, 1.0) == 1800


# The toy job under real launchers.

ENDLESS = {"stop_step": 100_000, "total_steps": 100_000, "steps_per_epoch": 1000}


def launch(launcher: str, folder: Path, fault: dict[str, Any] | None = None, **recipe: Any) -> Group:
    recipe = {"output": str(folder / "run"), "hang_seconds": HANG, "checkpoint_every": 2, **recipe}
    arguments = json.dumps({"recipe": recipe, "plan": ENDLESS, "fault": fault or {}})
    if launcher == "torchrun":
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tests.engine.job"]
    else:
        words = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--module", "tests.engine.job"]
    return Group(folder, [[sys.executable, *words, arguments]])


def find(group: Group, *words: str) -> int:
    [pid] = [pid for pid, line in group.processes().items() if all(word in line for word in words)]
    return pid


def saved_after(group: Group, step: int) -> Callable[[], bool]:
    return lambda: (group.folder / "run" / "checkpoints" / f"step-{step}" / checkpoint.MANIFEST).exists()


def newest(group: Group) -> int:
    """The step of the newest checkpoint, which is whole."""
    found = checkpoint.steps(group.folder / "run" / "checkpoints")[0]
    assert checkpoint.fault(found) is None
    return int(found.name[5:])


@pytest.fixture
def cleaned() -> Iterator[list[Group]]:
    started: list[Group] = []
    yield started
    for group in started:
        group.kill()


def test_under_torchrun_a_rank_hangs_in_its_forward_pass_while_the_other_gathers(tmp_path, cleaned):
    """ZeRO-3: both are in the forward pass, rank 0 in a collective."""
    group = launch("torchrun", tmp_path, {"step": 9, "rank": 1, "hang": "forward"}, zero_stage=3)
    cleaned.append(group)
    group.wait_for(lambda: "hangs" in group.output() or not group.processes())
    group.wait_until_gone()
    [message] = group.messages()
    assert "rank 1 on" in message and "hangs in step 5 (forward)" in message and "job.py" in message
    assert group.codes()[0] > 0 and newest(group) in (2, 4)


def test_under_deepspeed_a_rank_is_stopped(tmp_path, cleaned):
    group = launch("deepspeed", tmp_path, zero_stage=2)
    cleaned.append(group)
    group.wait_for(saved_after(group, 4))
    os.kill(find(group, "tests.engine.job", "--local_rank=1", "-u"), signal.SIGSTOP)
    group.wait_until_gone()
    [message] = group.messages()
    assert "rank 1 on" in message and "is stopped (SIGSTOP) in step" in message
    assert group.codes()[0] > 0 and newest(group) >= 4


@pytest.mark.parametrize(("launcher", "module"), [("torchrun", "torch.distributed.run"), ("deepspeed", ".launch ")])
def test_when_the_launcher_is_killed_its_ranks_save_and_end(tmp_path, cleaned, launcher, module):
    group = launch(launcher, tmp_path, zero_stage=2, checkpoint_every=0)
    cleaned.append(group)
    group.wait_for(lambda: (group.folder / "run" / "metrics.jsonl").exists())
    os.kill(find(group, module, "-m"), signal.SIGKILL)
    group.wait_until_gone()
    assert "the launcher of rank 0 on" in group.messages()[0]
    assert newest(group) == max(losses(group.folder / "run"))
