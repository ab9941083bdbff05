"""The processes of a rehearsal: this package's own commands, with their logs, and nothing of them left behind."""

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ummim.errors import EXIT_USER, UserError

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 600.0  # seconds for one command
LAST_LINES = 12
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Process(Protocol):
    """What of ``subprocess.Popen`` is used."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float) -> int: ...
    def kill(self) -> None: ...


Start = Callable[[list[str], Mapping[str, str], Path], Process]
"""Start ``python WORDS...`` with more environment variables; both its outputs are appended to a file."""


def start(words: list[str], more: Mapping[str, str], log: Path) -> Process:
    """Start it as a process from nothing."""
    env = {name: value for name, value in os.environ.items() if name not in RENDEZVOUS}
    paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    env |= {"PYTHONPATH": os.pathsep.join(paths), **more}
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *words], env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )


class StageFailed(Exception):
    """A stage that did not do what it must.

    Attributes:
        told: what is wrong, the command, and the end of its log.
        code: the exit code to end with: 2 where a command found the recipe at fault, else 1.
    """

    def __init__(self, told: str, code: int = 1) -> None:
        super().__init__(told)
        self.code = code


class Job:
    """One command on one or more ranks, without a launcher; gloo on the CPU."""

    def __init__(self, begin: Start, name: str, words: Sequence[object], logs: Path, ranks: int | None = None) -> None:
        self.words = [str(word) for word in words]
        self.ranks = ranks
        common = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        self.logs = [logs / (f"{name}.log" if ranks in (None, 1) else f"{name}-{i}.log") for i in range(ranks or 1)]
        more = [common] if ranks is None else [{**common, **rank} for rank in _rendezvous(ranks)]
        self.processes: list[Process] = []
        try:
            for env, log in zip(more, self.logs, strict=True):
                self.processes.append(begin(self.words, env, log))
        except BaseException:
            self.end()
            raise

    def finish(self, allowed: Sequence[int] = (0,)) -> int:
        """Wait for all ranks; returns the first's exit code. Raises StageFailed for one that is not ``allowed``."""
        codes = self.wait()
        for rank, code in enumerate(codes):
            if code not in allowed:
                raise self.failed(f"ended with exit code {code}", rank, EXIT_USER if code == EXIT_USER else 1)
        return codes[0]

    def wait(self) -> list[int]:
        """Every rank's exit code. Raises StageFailed after ``TIMEOUT``."""
        try:
            return [process.wait(TIMEOUT) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise self.failed(f"did not end within {TIMEOUT:g} s") from None
        finally:
            self.end()

    def running(self) -> bool:
        """None of its processes has ended."""
        return all(process.poll() is None for process in self.processes)

    def left(self, rank: int, patience: float) -> float | None:
        """Seconds until a rank has ended by itself; None: it has not, after ``patience`` seconds."""
        begun = time.monotonic()
        while self.processes[rank].poll() is None:
            if time.monotonic() - begun > patience:
                return None
            time.sleep(0.02)
        return time.monotonic() - begun

    def end(self) -> None:
        """Kill what is left of it."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait(10)

    def failed(self, what: str, rank: int = 0, code: int = 1) -> StageFailed:
        """The error that tells what went wrong, by which command, and how its log ends."""
        log = self.logs[rank]
        lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:] if log.is_file() else []
        of = f" (rank {rank} of {self.ranks})" if self.ranks and self.ranks > 1 else ""
        told = [f"{what}{of}", f"command: {shlex.join(['python', *self.words])}", f"log: {log}, which ends:"]
        return StageFailed("\n".join([*told, *(f"  | {line}" for line in lines or ["(nothing)"])]), code)


def _rendezvous(ranks: int) -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def entry_point() -> Path:
    """``train.py``, which lies beside the package in a checkout.

    Raises:
        UserError: this is an installation without it.
    """
    path = ROOT / "train.py"
    if not path.is_file():
        raise UserError(
            f"{path}: not there: a rehearsal runs train.py, which comes with the repository and not with the installed "
            "package: run `python -m ummim rehearse` in a clone of it"
        )
    return path
