"""The job that ``chaos.py`` disturbs: a tiny MAE on hosts made of namespaces, started as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.conftest import TINY_MAE
from tests.launch.conftest import build_shards
from tests.launch.hosts import Hosts

RANK = f"{sys.executable} -u train.py"
LAUNCHERS = ("deepspeed", "torchrun")
PORT = 29500
STEPS_PER_EPOCH = 4  # of 26 images in batches of 6
COMPARED = ("step", "epoch", "samples", "loss", "lr", "grad_norm", "data_faults", "bad_steps")


def write_recipe(folder: Path, steps: int, checkpoint_every: int, hang_seconds: float) -> Path:
    """Shards of 26 small pictures and a recipe that trains on them for ``steps`` optimizer steps."""
    values = {
        "epochs: 4": f"epochs: {-(-steps // STEPS_PER_EPOCH)}",
        "_batch: 8": "_batch: 6",
        "_every: 4": f"_every: {checkpoint_every}",
        "figure_every: 2": "figure_every: 10",
        "workers: 0": "workers: 1",
        "zero_stage: 1": "zero_stage: 2",
        "SHARDS": str(build_shards(folder, seed=0)),
    }
    text = TINY_MAE
    for old, new in values.items():
        text = text.replace(old, new)
    path = folder / "chaos.yaml"
    path.write_text(f"{text}milestone_every: 10\nkeep_checkpoints: 3\nhang_seconds: {hang_seconds}\n")
    return path


def records(output: Path) -> list[dict[str, Any]]:
    """What of ``metrics.jsonl`` does not depend on time, line by line; a line torn by a kill is passed over."""
    path, found = output / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            record = json.loads(line)
            found.append({name: record[name] for name in COMPARED})
    return found


def undisturbed(hosts: Hosts, recipe: Path, output: Path, ranks: int) -> list[dict[str, Any]]:
    """The same run on one host, without a launcher and without faults: its records."""
    processes, log = [], output.with_suffix(".log")
    with log.open("w") as file:
        for rank in range(ranks):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": PORT + 1}
            env = hosts.environment(MASTER_ADDR=hosts.address("host1"), **{k: str(v) for k, v in places.items()})
            words = [sys.executable, "train.py", str(recipe), f"output={output}"]
            processes.append(hosts.popen("host1", words, env=env, stdout=file, stderr=file))
    codes = [process.wait(1800) for process in processes]
    if any(codes):
        raise RuntimeError(f"the undisturbed run ended with {codes}: {log.read_text()}")
    return records(output)


class Job:
    """One start of the job, from ``launch/deepspeed.sh`` on host1, or ``launch/torchrun.sh`` on every host."""

    def __init__(self, hosts: Hosts, launcher: str, words: Sequence[str], log: Path) -> None:
        self.hosts, self.launcher, self.log = hosts, launcher, log
        env = hosts.environment(PYTHON=sys.executable, FREE_GIB="0", MASTER_PORT=str(PORT))
        env["TMPDIR"] = str(log.parents[1] / "tmp")  # nobody else's
        if launcher == "deepspeed":
            env["HOSTFILE"] = str(hosts.hostfile(log.with_name("hostfile")))
            command, names = ["launch/deepspeed.sh", "--skip-preflight", *words], hosts.names[:1]
        else:
            env |= {"NNODES": str(len(hosts.names)), "NPROC_PER_NODE": "1", "MAX_RESTARTS": "0"}
            env["RDZV_ENDPOINT"] = f"host1:{PORT - 100}"
            command, names = ["launch/torchrun.sh", *words], hosts.names
        with log.open("w") as file:
            self._started = [hosts.popen(name, command, env=env, stdout=file, stderr=file) for name in names]

    @property
    def codes(self) -> list[int | None]:
        """The scripts' exit codes; None: still running."""
        return [process.poll() for process in self._started]

    @property
    def ended(self) -> bool:
        return None not in self.codes

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self, name: str) -> list[int]:
        found = self._train(name)
        return [pid for pid in found if parent(pid) not in found]

    def workers(self, name: str) -> list[int]:
        """Loader workers, which are forks of their ranks."""
        found = self._train(name)
        return [pid for pid in found if parent(pid) in found]

    def _train(self, name: str) -> list[int]:
        return [pid for pid, line in self.hosts.processes(name).items() if line.startswith(RANK)]

    def left(self) -> dict[str, str]:
        """Command lines of all processes on all hosts, by host and process id."""
        return {f"{name} {pid}": line[:150] for name in self.hosts.names
                for pid, line in self.hosts.processes(name).items()}  # fmt: skip

    def close(self) -> None:
        """Kill what is left, wherever it is."""
        for name in self.hosts.names:
            for pid in self.hosts.processes(name):
                with suppress(ProcessLookupError):
                    subprocess.run(["kill", "-9", str(pid)], stderr=subprocess.DEVNULL)
        for process in self._started:
            process.kill()
            process.wait()


def parent(pid: int) -> int:
    """The process above another one; 0 if that is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
