"""Training on several hosts, as a user starts it: launch/deepspeed.sh over pdsh, launch/torchrun.sh on each."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.launch.hosts import Hosts

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]
RANK = f"{sys.executable} -u train.py"


def losses(output: Path) -> list[float]:
    """By step, each of which must be there once."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def steps_done(output: Path) -> int:
    path = output / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def wait(holds: Callable[[], bool], job: subprocess.Popen[str], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert job.poll() is None, "the job has ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ranks(hosts: Hosts, name: str) -> list[int]:
    return [pid for pid, line in hosts.processes(name).items() if line.startswith(RANK)]


def nothing_left(hosts: Hosts) -> bool:
    return not any(hosts.processes(name) for name in hosts.names)


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same run in one process."""
    output = tmp_path_factory.mktemp("undisturbed")
    words = [sys.executable, "train.py", str(recipe), f"output={output}", "zero_stage=0"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert len(losses(output)) == 40
    return losses(output)


def test_deepspeed_on_two_hosts_is_preempted_and_goes_on_with_zero_3_on_three(
    hosts: Hosts, recipe: Path, undisturbed: list[float], tmp_path: Path
):
    output = tmp_path / "run"
    # A word that no shell on the way may touch.
    command = ["launch/deepspeed.sh", str(recipe), f"output={output}", 'description=it\'s $HOME, 50%n "so"']

    def start(names: list[str], *words: str) -> subprocess.Popen[str]:
        hostfile = hosts.hostfile(tmp_path / f"hostfile{len(names)}", names=names)
        env = hosts.environment(PYTHON=sys.executable, HOSTFILE=str(hostfile), FREE_GIB="0")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
        return hosts.popen("host1", [*command, *words], **pipes)

    job = start(["host1", "host2"], "--skip-preflight", "zero_stage=2")
    wait(lambda: steps_done(output) >= 3, job)
    (rank,) = ranks(hosts, "host2")
    os.kill(rank, signal.SIGTERM)
    printed, errors = job.communicate(timeout=90)
    assert job.returncode == 143, errors
    assert nothing_left(hosts)
    (saved,) = (output / "checkpoints").glob("step-*")
    assert saved.name == f"step-{steps_done(output)}"
    assert 'description: it\'s $HOME, 50%n "so"' in (output / "recipe.yaml").read_text()

    job = start(["host1", "host2", "host3"], "zero_stage=3")
    printed, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors
    assert "all-reduce over 3 hosts (gloo over eth0, 10.77.0.1:29500)" in printed  # by the preflight
    assert f"ummim: {output}: step 40 of 40 in step-40, ended" in errors
    assert nothing_left(hosts)
    assert losses(output) == pytest.approx(undisturbed, rel=1e-5)


def test_torchrun_brings_a_killed_rank_back_and_goes_on_with_one_host_when_the_other_is_cut_off(
    hosts: Hosts, recipe: Path, undisturbed: list[float], tmp_path: Path
):
    """The first host holds torchrun's store: the other one cannot tell its own cable from that host's end."""
    output, logs = tmp_path / "run", {name: tmp_path / name for name in ("host1", "host2")}
    env = hosts.environment(
        PYTHON=sys.executable, NNODES="1:2", NPROC_PER_NODE="1", MAX_RESTARTS="2", RDZV_ENDPOINT="host1:29400"
    )
    words = ["launch/torchrun.sh", str(recipe), f"output={output}", "zero_stage=2", "checkpoint_every=5"]
    jobs = []
    for name, log in logs.items():
        with log.open("w") as file:
            jobs.append(hosts.popen(name, words, env=env, stdout=file, stderr=file, text=True))
    wait(lambda: steps_done(output) >= 8, jobs[0])
    (rank,) = ranks(hosts, "host2")
    os.kill(rank, signal.SIGKILL)
    wait(lambda: "resuming" in logs["host1"].read_text(), jobs[0])
    wait(lambda: steps_done(output) >= 12, jobs[0])
    assert len(ranks(hosts, "host2")) == 1
    hosts.link("host2", "down")
    begun = time.monotonic()
    try:
        assert jobs[1].wait(120) != 0
        assert time.monotonic() - begun < 60
        assert jobs[0].wait(240) == 0, logs["host1"].read_text()
    finally:
        hosts.link("host2", "up")
    told = logs["host1"].read_text()
    assert "rank 1 on host2 (process" in told  # killed
    assert "nothing heard from rank 1 on host2 for 20 s" in told
    assert re.findall(r"resuming \S+ after step (\d+) of 40", told)[1] >= "10"
    assert "was saved at world size 2, zero_stage 2" in told
    assert "host1:29400, where the hosts meet, cannot be reached" in logs["host2"].read_text()
    state = json.loads((output / "checkpoints" / "step-40" / "state.json").read_text())
    assert (state["world_size"], state["global_batch"]) == (1, 6)
    assert losses(output) == pytest.approx(undisturbed, rel=1e-5)
    assert nothing_left(hosts)
