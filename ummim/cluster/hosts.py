"""The hosts of a job, from a hostfile as DeepSpeed and MPI read it: ``NAME slots=N``, a line per host."""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ummim.errors import UserError

_NAME = re.compile(r"(?:\w[\w.-]*@)?\w[\w.:-]*")  # it goes to ssh and pdsh: nothing there may read as an option
_LINE = re.compile(r"(\S+)\s+slots=(\d+)")


@dataclass(frozen=True)
class Host:
    """A machine of the job.

    Attributes:
        name: as ssh takes it.
        slots: ranks on it, one for each GPU.
    """

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a hostfile, in its order: the first holds rank 0. ``#`` starts a comment.

    Raises:
        UserError: no such file, a line that is no host, a host named twice, or no host at all.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"{path}: {reason}: give a hostfile with a line NAME slots=GPUS for each host") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        match = _LINE.fullmatch(words)
        if match is None:
            raise UserError(
                f"{path}: line {number}: {words!r} is no host: write NAME slots=GPUS, such as node1 slots=8"
            )
        name, slots = match[1], int(match[2])
        if not _NAME.fullmatch(name):
            raise UserError(f"{path}: line {number}: {name!r} is no host name: use letters, digits, dots and hyphens")
        if slots < 1:
            raise UserError(f"{path}: line {number}: {name} has slots=0: give its number of GPUs, or remove the line")
        if name in hosts:
            raise UserError(f"{path}: line {number}: {name} is named twice: give each host one line with all its slots")
        hosts[name] = Host(name, slots)
    if not hosts:
        raise UserError(f"{path}: names no host: write a line NAME slots=GPUS for each")
    return list(hosts.values())


def slurm_hosts(environment: Mapping[str, str]) -> list[Host]:
    """The nodes of the Slurm job that this process belongs to; slots are the GPUs it asked for on each.

    Raises:
        UserError: there is no job, or Slurm's commands are missing.
    """
    nodes = environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise UserError("SLURM_JOB_NODELIST is not set: run this inside a Slurm job (sbatch or salloc)")
    try:
        found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"scontrol cannot list the job's nodes ({error}): run this where Slurm is installed") from None
    gpus = environment.get("SLURM_GPUS_ON_NODE", "0")
    return [Host(name, int(gpus) if gpus.isdigit() else 0) for name in found.stdout.split()]
