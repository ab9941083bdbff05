"""Ends a job whose supervisor was killed: ``python -m ummim.cluster.successor LAUNCHER COMMANDS [FOLDER]``.

The supervisor starts it beside the launcher and writes a byte to it at its own end. Where its input ends without that
byte, it kills the launcher (a process group), runs all COMMANDS (JSON, a list of argv) at once, which end the job on
its hosts, and removes FOLDER. Else ``kill -9`` of a supervisor would leave a job running that nobody sees.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ummim.errors import say

SECONDS = 60.0  # for each of the commands


class Successor:
    """Waits for the end of this process until ``dismiss`` is called.

    Args:
        launcher: process group to kill.
        commands: the argvs that end the job.
        folder: to be removed then.
    """

    def __init__(self, launcher: int, commands: Sequence[Sequence[str]], folder: Path | None = None) -> None:
        words = [str(launcher), json.dumps([list(command) for command in commands]), *([str(folder)] if folder else [])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ummim.cluster.successor", *words], stdin=subprocess.PIPE, start_new_session=True
        )

    def dismiss(self) -> None:
        with suppress(BrokenPipeError):
            self._process.communicate(b"x")


def end_group(launcher: int) -> None:
    """Kill a launcher and what it has started on this host: pdsh, and pdsh's ssh."""
    with suppress(ProcessLookupError):
        os.killpg(launcher, signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # schedulers signal every process
        signal.signal(number, signal.SIG_IGN)
    launcher, commands, *folders = arguments
    if sys.stdin.buffer.read(1):
        return 0
    say("ummim: this job's supervisor was killed: all ranks save and end")
    end_group(int(launcher))
    none = subprocess.DEVNULL
    running = [subprocess.Popen(words, stdin=none, stdout=none) for words in json.loads(commands)]
    for process in running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
