"""What of a job runs on this host: the processes that carry its name in their environment.

``python -m ummim.cluster.jobs NAME TERM|INT|USR1|end`` signals the ranks among them or ends them all, and prints how
many it signalled or had to kill. The launch scripts give each job a name of its own in ``UMMIM_JOB``, which all its
processes inherit: another job of the same user is never touched.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

VARIABLE = "UMMIM_JOB"
LEAVE_SECONDS = 20.0  # to finish a save that is under way


def processes(job: str, ranks: bool = False) -> list[int]:
    """The job's processes on this host, without this one and those above it.

    ranks: only those that train: they have a RANK, and their parent has none.
    """
    spared = {os.getpid(), *_ancestors(os.getpid())}
    mark = f"{VARIABLE}={job}".encode()
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) not in spared:
            variables = _variables(int(folder.name))
            if mark in variables:
                found[int(folder.name)] = any(v.startswith(b"RANK=") for v in variables)
    return sorted(p for p, rank in found.items() if not ranks or (rank and not found.get(_parent(p), False)))


def send(pids: Iterable[int], number: int) -> None:
    """Send a signal to those of the processes that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def end(job: str, seconds: float = LEAVE_SECONDS) -> int:
    """End the job on this host: SIGTERM to its ranks, ``seconds`` for all to leave, then SIGKILL.

    Returns how many had to be killed.
    """
    send(processes(job, ranks=True), signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while processes(job) and time.monotonic() < deadline:
        time.sleep(0.2)
    left = processes(job)
    send(left, signal.SIGKILL)
    return len(left)


def _variables(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or another user's
        return []


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _ancestors(pid: int) -> list[int]:
    found = []
    while pid := _parent(pid):
        found.append(pid)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ummim.cluster.jobs", description="Signal a job's processes here.")
    parser.add_argument("job", help=f"its {VARIABLE}")
    parser.add_argument("what", choices=("TERM", "INT", "USR1", "end"))
    options = parser.parse_args()
    if options.what == "end":
        print(end(options.job))
    else:
        ranks = processes(options.job, ranks=True)
        send(ranks, signal.Signals[f"SIG{options.what}"])
        print(len(ranks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
