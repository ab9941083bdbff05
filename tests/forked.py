"""Python programs in processes of their own that have imported everything: forked, they start in no time.

Like ``subprocess``, but from a server process that has imported torch, DeepSpeed and timm once, which takes four
seconds of a core. What starts from nothing and launchers do is tested with real ones.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ummim.engine.zero import RENDEZVOUS

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])


class Job:
    """``python WORDS...``: a file and its arguments, or ``-m``, a module and its arguments.

    It has this process's environment without a launcher's variables, and with those of ``rendezvous``.
    """

    def __init__(self, words: Sequence[object], cwd: Path, rendezvous: Mapping[str, str] | None = None) -> None:
        self.words = [str(word) for word in words]
        self._folder = tempfile.TemporaryDirectory()
        self._files = tuple(str(Path(self._folder.name) / name) for name in ("stdout", "stderr"))
        kept = {name: value for name, value in os.environ.items() if name not in RENDEZVOUS}
        env = {**kept, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(rendezvous or {})}
        arguments = (self.words, str(cwd), env, self._files)
        self._process = _CONTEXT.Process(target=_become, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, or None while it runs; that of a signal is negative."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Its end. Raises subprocess.TimeoutExpired, and kills it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self.words, timeout)
        out, err = (Path(file).read_text() for file in self._files)
        self._folder.cleanup()
        return subprocess.CompletedProcess(self.words, self._process.exitcode, out, err)


def run(words: Sequence[object], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Start it and wait for its end."""
    return Job(words, cwd).wait()


def run_ranks(
    ranks: int, words: Sequence[object], cwd: Path, timeout: float = 240
) -> list[subprocess.CompletedProcess[str]]:
    """The same as one process group, without a launcher: each rank's end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    jobs = [Job(words, cwd, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]
    try:
        return [job.wait(timeout) for job in jobs]
    finally:
        for job in jobs:
            if job.poll() is None:
                job.send_signal(signal.SIGKILL)


def _become(words: list[str], cwd: str, env: dict[str, str], files: tuple[str, str]) -> None:
    for number, file in enumerate(files, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)  # for data workers: a forkserver hands down its own
    if words[0] == "-m":
        sys.argv = [words[1], *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
