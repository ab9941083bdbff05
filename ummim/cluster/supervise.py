"""A launcher, watched: its signals, its silent failures, what it leaves behind, and whether the run has ended.

``python -m ummim.cluster.supervise SECONDS RECIPE [key=value ...] -- COMMAND ...`` runs a launcher that starts failed
ranks anew, as torchrun does, on this host. Exit codes: 0 the run has reached its end, 130 and 143 interrupted, else
the launcher's, never 0.
"""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from ummim.cluster.jobs import VARIABLE, end, processes, send
from ummim.cluster.successor import Successor, end_group
from ummim.errors import run_main, say

LOST = re.compile(rb"pdsh@\S+: (\S+): ssh exited with exit code (\d+)")
GRACE = 30.0  # seconds that the other hosts have to end as well, once the launcher has lost one
SAVED = (130, 143)
SAVE_GRACE = 300.0  # the same where that host has saved
AGAIN = 2.0  # seconds after which a rank that had just started, and may not have heard, is asked once more
LOOK = 5.0  # seconds between two looks for the meeting point, three of which must fail
ENDPOINT = "--rdzv-endpoint"
_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


def new_job() -> str:
    """A name that no other job has."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def tell(text: str) -> None:
    say(f"ummim: {text}")


class Supervisor:
    """Runs one launcher to its end.

    Args:
        command: its argv.
        environment: its variables.
        stop: asks the ranks to save and leave, by this signal; returns how many there are.
        remaining: of a launcher that starts failed ranks anew: how many of those that were asked are still there; it
            hears no signal itself, and is ended once there are none. None: it ends when its ranks do.
        save_seconds: how long they may take.
        hopeless: why the launcher can do no more, though it has not ended; empty if it can.
        ending: argvs that end the job on its hosts, should this process be killed.
        folder: to be removed then.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        stop: Callable[[signal.Signals], int],
        remaining: Callable[[], int] | None = None,
        save_seconds: float = SAVE_GRACE,
        hopeless: Callable[[], str] = str,
        ending: Sequence[Sequence[str]] = (),
        folder: Path | None = None,
    ) -> None:
        self.command, self.environment, self.stop, self.remaining = command, environment, stop, remaining
        self.save_seconds, self.hopeless, self.ending, self.folder = save_seconds, hopeless, ending, folder
        self.asked: signal.Signals | None = None
        self._times = self._answered = 0  # signals that came, and that were answered
        self._deadline = float("inf")
        self._first = self._lost = 0  # exit codes of a host that the launcher lost: the first, the one that counts
        self._killed = False  # by us

    def run(self) -> int:
        """The launcher's exit code, with 128 + N for signal N; where it had to be ended, that of the host it lost."""
        previous = {number: signal.signal(number, self._handle) for number in _CODES}
        process = subprocess.Popen(
            self.command,
            env=dict(self.environment),
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=None if self.remaining is None else _hear_nothing,
        )
        successor = Successor(process.pid, self.ending, self.folder)
        try:
            reader = threading.Thread(target=self._read, args=(process.stderr,), daemon=True)
            reader.start()
            while (code := process.poll()) is None:
                self._look(process)
                time.sleep(0.1)
            reader.join(2.0)  # a process that it left behind may hold the pipe open
        finally:
            successor.dismiss()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if code < 0 and not self._killed:
            tell(f"the launcher was killed by {signal.Signals(-code).name}: all ranks save and end")
        return self._lost or (128 - code if code < 0 else code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number)
        self._times += 1

    def _look(self, process: subprocess.Popen[bytes]) -> None:
        """Do what is due."""
        now = time.monotonic()
        if self.asked is not None and self._answered == 0:
            self._answered = self._times  # schedulers signal every process, and some of them twice
            found = self.stop(self.asked)
            tell(f"{self.asked.name}: {found} ranks are asked to save; once more ends at once")
            if found == 0:
                self._kill(process)
            self._deadline = min(self._deadline, now + self.save_seconds)
        elif self._times > self._answered and self.asked == signal.SIGINT:
            tell("told again: ending at once")
            self._answered = self._times
            self._kill(process)
        elif now > self._deadline:
            tell("not all ranks have ended in time: ending the job")
            self._deadline, self._lost = float("inf"), self._first
            self._kill(process)
        elif self._answered and self.remaining is not None and self.remaining() == 0:
            self._kill(process)
        elif reason := self.hopeless():
            tell(f"{reason}: ending the job here")
            self._kill(process)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        self._killed = True
        end_group(process.pid)

    def _read(self, errors: IO[bytes]) -> None:
        """Pass the launcher's stderr on; note the first host that it lost."""
        for line in errors:
            sys.stderr.buffer.write(line)
            sys.stderr.flush()
            if found := LOST.search(line):
                self._first = self._first or int(found[2])
                grace = SAVE_GRACE if int(found[2]) in SAVED else GRACE
                self._deadline = min(self._deadline, time.monotonic() + grace)


def _hear_nothing() -> None:
    """In the launcher, before it starts. Slurm signals every process of a job, and a torchrun that hears a signal
    twice no longer waits for its ranks."""
    for number in _CODES:
        signal.signal(number, signal.SIG_IGN)


def outcome(code: int, asked: signal.Signals | None, recipe: str, overrides: Sequence[str]) -> int:
    """The job's exit code from its launcher's. 0 is not believed: the run must have reached its end."""
    if asked is not None and code not in SAVED:
        tell(f"ended by {asked.name}; the same command goes on from the newest checkpoint")
        return _CODES[asked]
    if code != 0:
        return code
    from ummim.cluster.status import status

    found = status(recipe, overrides, whole=False)
    if not found.ended:
        tell("the launcher ended with exit code 0 before the run was at its end: was a part of it killed?")
    tell(str(found))
    return 0 if found.ended else 1


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before and after the first ``--``."""
    place = arguments.index("--")
    return list(arguments[:place]), list(arguments[place + 1 :])


class LocalRanks:
    """A job's ranks on this host. ``endpoint``: NAME:PORT where its launcher meets those of other hosts."""

    def __init__(self, job: str, endpoint: str = "") -> None:
        self.job, self.endpoint = job, endpoint
        self._asked: list[int] = []
        self._again = 0.0
        self._seen, self._failed, self._look = False, 0, 0.0

    def cut_off(self) -> str:
        """Why no rank will come back: they have ended, and nobody is there to meet. torchrun waits all the same."""
        if not self.endpoint or time.monotonic() < self._look:
            return ""
        self._look = time.monotonic() + LOOK
        there = bool(processes(self.job, ranks=True))
        self._seen = self._seen or there
        host, _, port = self.endpoint.rpartition(":")
        try:
            if self._seen and not there:
                socket.create_connection((host, int(port)), timeout=LOOK).close()
            self._failed = 0
        except OSError:
            self._failed += 1
        return f"{self.endpoint}, where the hosts meet, cannot be reached" if self._failed >= 3 else ""

    def stop(self, number: signal.Signals) -> int:
        self._asked = processes(self.job, ranks=True)
        send(self._asked, number)
        self._again = time.monotonic() + AGAIN
        return len(self._asked)

    def remaining(self) -> int:
        """How many of those that were asked are still there; asks them again, by SIGTERM, from time to time."""
        self._asked = sorted(set(self._asked) & set(processes(self.job)))
        if time.monotonic() > self._again:
            send(self._asked, signal.SIGTERM)
            self._again = time.monotonic() + AGAIN
        return len(self._asked)


def main(arguments: Sequence[str]) -> int:
    (seconds, recipe, *overrides), command = split(arguments)
    job = new_job()
    ranks = LocalRanks(job, command[command.index(ENDPOINT) + 1] if ENDPOINT in command else "")
    environment = {**os.environ, VARIABLE: job}
    ending = [[sys.executable, "-m", "ummim.cluster.jobs", job, "end"]]
    supervisor = Supervisor(command, environment, ranks.stop, ranks.remaining, float(seconds), ranks.cut_off, ending)
    code = supervisor.run()
    if left := end(job):
        tell(f"the launcher had left {left} processes behind: killed")
    return outcome(code, supervisor.asked, recipe, overrides)


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(sys.argv[1:])))
