"""``sbatch launch/slurm.sbatch`` on a Slurm of two nodes: told to save, it is put back into the queue and goes on."""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.hosts import Hosts, wait
from tests.launch.slurm import Slurm
from tests.launch.test_jobs_on_hosts import losses, steps_done

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]


@pytest.fixture
def slurm(hosts: Hosts) -> Iterator[Slurm]:
    with tempfile.TemporaryDirectory() as folder, Slurm(hosts, hosts.names[:2], Path(folder)) as cluster:
        yield cluster  # not in tmp_path: the names of the daemons' sockets, at most 107 bytes, would be too long


def test_a_job_that_is_told_to_save_is_requeued_and_goes_on(slurm: Slurm, hosts: Hosts, recipe: Path, tmp_path: Path):
    output, log = tmp_path / "run", tmp_path / "log"
    environment = {"PYTHON": sys.executable, "NPROC_PER_NODE": "1", "SKIP_PREFLIGHT": "1"}
    words = ["launch/slurm.sbatch", str(recipe), f"output={output}", "zero_stage=2", "description=it's one"]
    job = slurm.run("sbatch", "--parsable", f"--output={log}", *words, **environment)
    assert job.isdigit()
    wait(lambda: steps_done(output) >= 3, 120)
    slurm.run("scancel", "--signal=USR1", job)  # as Slurm itself, two minutes before the time limit
    wait(lambda: slurm.state(job) == "PENDING", 60)
    assert "stopped after step" in log.read_text()
    reached = steps_done(output)
    assert 3 <= reached < 40
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")  # else two minutes
    wait(lambda: slurm.state(job) == "COMPLETED", 120)
    told = log.read_text()
    assert f"resuming {output} after step {reached} of 40" in told
    assert f"{output}: step 40 of 40 in step-40, ended" in told
    assert len(losses(output)) == 40
    assert json.loads((output / "checkpoints" / "step-40" / "state.json").read_text())["world_size"] == 2
    assert "description: it's one" in (output / "recipe.yaml").read_text()
    wait(lambda: all("train.py" not in line for name in hosts.names for line in hosts.processes(name).values()), 20)
