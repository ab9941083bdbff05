"""A Slurm cluster on hosts made of namespaces: one controller, a daemon per host, ``launch/slurm.sbatch`` as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.launch.hosts import Hosts, wait

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel")
PACKAGES = "slurmctld slurmd slurm-client munge"
_PATH = os.pathsep.join(("/usr/sbin", "/sbin", os.environ.get("PATH", "")))

CONFIG = """
ClusterName=test
SlurmctldHost={first}({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
KillWait=30
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmdLogFile={folder}/%n/slurmd.log
SlurmdSpoolDir={folder}/%n/spool
JobAcctGatherType=jobacct_gather/none
PartitionName=all Nodes=ALL Default=YES State=UP
"""
NODE = "NodeName={name} NodeAddr={address} CPUs=64 RealMemory=1000 Gres=gpu:8 State=UNKNOWN\n"  # none of it is there


def why_not() -> str | None:
    """Why there is no Slurm on this machine; None if there is."""
    missing = [name for name in NEEDED if shutil.which(name, path=_PATH) is None]
    return f"{', '.join(missing)} not installed (apt-get install {PACKAGES})" if missing else None


class Slurm:
    """``with Slurm(hosts, names, folder) as slurm``: nodes of 64 CPUs and 8 GPUs each, as far as Slurm knows."""

    def __init__(self, hosts: Hosts, names: Sequence[str], folder: Path) -> None:
        self.hosts, self.names, self.folder = hosts, names, folder
        self.environment = hosts.environment(SLURM_CONF=str(folder / "slurm.conf"))
        self._daemons: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Slurm:
        first = self.names[0]
        (self.folder / "state").mkdir(parents=True)
        for number in range(8):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        config = CONFIG.format(first=first, address=self.hosts.address(first), folder=self.folder)
        config += "".join(NODE.format(name=name, address=self.hosts.address(name)) for name in self.names)
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        try:
            self._daemon(first, ["munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files])
            wait(lambda: (self.folder / "munge.socket").exists(), 20)
            self._daemon(first, ["slurmctld", "-D"])
            for name in self.names:
                (self.folder / name / "spool").mkdir(parents=True)
                self._daemon(name, ["slurmd", "-D", "-N", name])
            wait(
                lambda: self.run("sinfo", "--noheader", "--format=%t %D").split() == ["idle", str(len(self.names))], 40
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *words: str, **extra: str) -> str:
        """What a command prints on the first node; empty where it fails."""
        done = self.hosts.run(self.names[0], words, env={**self.environment, **extra})
        return done.stdout.strip() if done.returncode == 0 else ""

    def state(self, job: str) -> str:
        """Such as PENDING, RUNNING, COMPLETED."""
        fields = dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", job).split() if "=" in word)
        return fields.get("JobState", "")

    def _daemon(self, name: str, words: Sequence[str]) -> None:
        log = (self.folder / f"{name}-{words[0]}.log").open("w")
        with log:
            self._daemons.append(
                self.hosts.popen(name, words, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )
