"""Processes of a rehearsal that are forked from a server, see ``tests.forked``: they start in no time."""

import signal
from collections.abc import Mapping
from pathlib import Path

from tests import forked
from tests.conftest import ROOT


class Forked:
    """``ummim.rehearsal.processes.Process``; its log is written at its end."""

    def __init__(self, words: list[str], more: Mapping[str, str], log: Path) -> None:
        self.job, self.log = forked.Job(words, ROOT, more), log
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.job.poll() if self.code is None else self.code

    def wait(self, timeout: float) -> int:
        if self.code is None:
            ended = self.job.wait(timeout)
            self.code = ended.returncode
            with self.log.open("a") as file:
                file.write(ended.stdout + ended.stderr)
        return self.code

    def kill(self) -> None:
        if self.job.poll() is None:
            self.job.send_signal(signal.SIGKILL)
