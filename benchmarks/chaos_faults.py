"""What ``chaos.py`` does to a run, and by which message each fault must be named."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chaos_job import Job, parent

FILLER = "filler"  # the file, beside the run's folder, that fills the disk
HOST = r"host\d+"
RANK = rf"rank \d+ on {HOST} \(process \d+\)"
CUT = rf"nothing heard from .* on {HOST} for|cannot be reached from {HOST} for|where the hosts meet, cannot be reached"


@dataclass(frozen=True)
class Kind:
    """A way to disturb a run.

    Attributes:
        name: for the table.
        inject: does it, and says to what; RuntimeError: there is nothing to do it to.
        told: the messages of which one must be printed, a regular expression.
        launchers: under which it can be done.
        ends: whether the job has to end; else it has to go on by itself.
    """

    name: str
    inject: Callable[[Job, Path, random.Random], str]
    told: str
    launchers: tuple[str, ...] = ("deepspeed", "torchrun")
    ends: bool = True


def send(job: Job, name: str, pids: list[int], number: signal.Signals) -> str:
    if not pids:
        raise RuntimeError(f"nothing to send {number.name} to on {name}: {job.left()}")
    os.kill(pids[0], number)
    return f"{number.name} on {name}"


def to_rank(number: signal.Signals) -> Callable[[Job, Path, random.Random], str]:
    def inject(job: Job, output: Path, rng: random.Random) -> str:
        name = rng.choice(job.hosts.names)
        return send(job, name, job.ranks(name), number)

    return inject


def kill_worker(job: Job, output: Path, rng: random.Random) -> str:
    name = rng.choice(job.hosts.names)
    return send(job, name, job.workers(name), signal.SIGKILL)


def kill(start: str, word: str, host: int | None = None) -> Callable[[Job, Path, random.Random], str]:
    """Kill the process whose command line starts with ``start`` and holds ``word``; host: by number, else any."""

    def inject(job: Job, output: Path, rng: random.Random) -> str:
        name = rng.choice(job.hosts.names) if host is None else job.hosts.names[host]
        found = [pid for pid, line in job.hosts.processes(name, word).items() if line.startswith(start)]
        return send(job, name, [pid for pid in found if parent(pid) not in found], signal.SIGKILL)

    return inject


def cut(job: Job, output: Path, rng: random.Random) -> str:
    job.hosts.link(job.hosts.names[-1], "down")
    return f"link of {job.hosts.names[-1]} down"


def fill(job: Job, output: Path, rng: random.Random) -> str:
    return f"{refill(output)} bytes written beside the run"


def refill(output: Path) -> int:
    """Fill the disk to the last byte."""
    written = 0
    with (output.parent / FILLER).open("ab", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while True:
                    written += file.write(b"\0" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return written


def mend(job: Job, output: Path) -> None:
    """Put the cable back and free the disk."""
    job.hosts.link(job.hosts.names[-1], "up")
    (output.parent / FILLER).unlink(missing_ok=True)


PYTHON = sys.executable
LAUNCH, GONE = "deepspeed.launcher.launch", rf"the launcher of {RANK} is gone"
SUPERVISOR = "this job's supervisor was killed"
KILLED = "the launcher was killed by SIGKILL"
DEEPSPEED, TORCHRUN = ("deepspeed",), ("torchrun",)
LIVE = (
    Kind("rank killed", to_rank(signal.SIGKILL), rf"{RANK} was killed or crashed in"),
    Kind("loader worker killed", kill_worker, r"data worker \d+ killed by SIGKILL, restarting", ends=False),
    Kind("rank stopped", to_rank(signal.SIGSTOP), rf"{RANK} is stopped \(SIGSTOP\)"),
    Kind("rank told to end", to_rank(signal.SIGTERM), r"stopped after step \d+, saved"),
    Kind("host cut off", cut, CUT),
    Kind("disk full", fill, r"disk full|No space left"),
    Kind("launch.py of the first host killed", kill(PYTHON, LAUNCH, 0), GONE, DEEPSPEED),
    Kind("launch.py of the other host killed", kill(PYTHON, LAUNCH, -1), GONE, DEEPSPEED),
    Kind("pdsh killed", kill("pdsh", LAUNCH, 0), "the launcher ended with exit code 0 before the run was", DEEPSPEED),
    Kind("deepspeed killed", kill(PYTHON, "deepspeed --hostfile", 0), KILLED, DEEPSPEED),
    Kind("supervisor killed", kill(PYTHON, "ummim.cluster.deepspeed_job", 0), SUPERVISOR, DEEPSPEED),
    Kind("torchrun killed", kill(f"{PYTHON} -m torch.distributed.run", ""), f"{GONE}|{KILLED}", TORCHRUN),
    Kind("supervisor killed", kill(PYTHON, "ummim.cluster.supervise"), SUPERVISOR, TORCHRUN),
)

TRUNCATED, DELETED, FLIPPED = "file truncated", "file deleted", "byte flipped"
DAMAGES = (TRUNCATED, DELETED, FLIPPED)
PASSED_OVER = r"{step}: .*; using step-\d+"


def damage(kind: str, checkpoint: Path, rng: random.Random) -> str:
    """Damage one file of a step folder; says which."""
    path = rng.choice(sorted(path for path in checkpoint.iterdir() if path.is_file()))
    size = path.stat().st_size
    if kind == DELETED:
        path.unlink()
        return f"{checkpoint.name}/{path.name}"
    if kind == TRUNCATED:
        length = rng.randrange(size)
        os.truncate(path, length)
        return f"{checkpoint.name}/{path.name} to {length} of {size} bytes"
    place = rng.randrange(size)
    with path.open("r+b") as file:
        file.seek(place)
        old = file.read(1)
        file.seek(place)
        file.write(bytes([old[0] ^ 0xFF]))
    return f"{checkpoint.name}/{path.name} at {place} of {size}"
