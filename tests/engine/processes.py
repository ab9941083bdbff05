"""Groups of processes that a test starts, finds again with all their children, and waits for."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.engine.conftest import environment

GONE_SECONDS = 60  # the promise
HANG, SILENT = 3, 5


class Group:
    """Processes that share a mark in their environment, guardians included."""

    def __init__(self, folder: Path, commands: list[list[str]], **extra: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.mark = f"UMMIM_TEST={folder}"
        self.started: list[subprocess.Popen[bytes]] = []
        for rank, words in enumerate(commands):
            known = {"UMMIM_TEST": str(folder), "RANK": str(rank)} if len(commands) > 1 else {"UMMIM_TEST": str(folder)}
            with (folder / "output").open("ab") as output:
                env = environment(**known, **extra)
                self.started.append(subprocess.Popen(words, env=env, stdout=output, stderr=output))

    def processes(self) -> dict[int, str]:
        """Command lines by process id, of those that are not zombies."""
        found = {}
        for path in Path("/proc").iterdir():
            try:
                if path.name.isdigit() and self.mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                    found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # gone meanwhile
                continue
        return found

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def wait_until_gone(self) -> None:
        deadline = time.monotonic() + GONE_SECONDS
        while self.processes():
            for process in self.started:
                process.poll()
            assert time.monotonic() < deadline, (self.processes(), self.output())
            time.sleep(0.1)

    def codes(self) -> list[int]:
        return [process.wait(5) for process in self.started]

    def output(self) -> str:
        return (self.folder / "output").read_text()

    def messages(self) -> list[str]:
        """The watchdog's."""
        told = [line for line in self.output().splitlines() if line.startswith("ummim: ")]
        return [line for line in told if "error:" not in line and "stopped after" not in line]

    def kill(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)


def two_ranks(folder: Path, fault: str = "", steps: int = 100_000, hosts: int = 1) -> list[list[str]]:
    """The commands of two ranks of ``watched.py``; ``fault``: of rank 1."""
    commands = []
    for rank in range(2):
        options = {"rank": rank, "local_rank": rank // hosts, "size": 2, "folder": str(folder)}
        options |= {"hang_seconds": HANG, "silent": SILENT, "steps": steps, "fault": fault if rank else ""}
        commands.append([sys.executable, "-m", "tests.engine.watched", json.dumps(options)])
    return commands
