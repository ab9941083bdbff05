"""Training on several hosts, as a user starts it: launch/deepspeed.sh over pdsh, launch/torchrun.sh on each."""

import json
import os
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


def test_torchrun_brings_a_killed_rank_back_and_ends_when_a_host_is_cut_off(hosts: Hosts, recipe: Path, tmp_path: Path):
    output = tmp_path / "run"
    env = hosts.environment(
        PYTHON=sys.executable, NNODES="2", NPROC_PER_NODE="1", MAX_RESTARTS="1", RDZV_ENDPOINT="host1:29400"
    )
    words = ["launch/torchrun.sh", str(recipe), f"output={output}", "zero_stage=2", "epochs=1000", "checkpoint_every=5"]
    logs = [(tmp_path / name).open("w+") for name in ("one", "two")]
    jobs = [
        hosts.popen(name, words, env=env, stdout=log, stderr=log, text=True)
        for name, log in zip(("host1", "host2"), logs, strict=True)
    ]
    wait(lambda: steps_done(output) >= 8, jobs[0])
    (rank,) = ranks(hosts, "host2")
    os.kill(rank, signal.SIGKILL)
    wait(lambda: "resuming" in (tmp_path / "one").read_text(), jobs[0])
    reached = steps_done(output)
    wait(lambda: steps_done(output) > reached + 3, jobs[0])
    losses(output)  # none is missing or double
    hosts.link("host2", "down")
    begun = time.monotonic()
    try:
        codes = [job.wait(120) for job in jobs]
    finally:
        hosts.link("host2", "up")
    assert time.monotonic() - begun < 60
    assert 0 not in codes
    assert nothing_left(hosts)
    for log in logs:
        log.close()
