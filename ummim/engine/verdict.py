"""When a run has failed, and through whom: judged by rank 0's guardian from what the guardians of all ranks report.

Nothing here reads a clock, a socket or a process: ``Judge`` is told how time passes and what it hears. Only the time
between two reports as the judge hears them counts, never another host's clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

RUNNING, STOPPED = "running", "stopped"  # stopped: by SIGSTOP or Ctrl-Z
LOST = "lost"  # its connection to another rank broke: a symptom
FAILED = "failed"  # an error of its own, with a traceback
REFUSED = "refused"  # ended by a message that it has told itself, such as a full disk
DONE = "done"
DEAD = "dead"  # the process is gone without a word
GONE = (FAILED, REFUSED, DONE, DEAD)

LATEST_START = 60.0  # seconds until a guardian must have reported for the first time
PARTING = 10.0  # seconds within which ranks that have agreed to end do so
STACK_SECONDS = 4.0  # for the guardians to take their ranks' stacks
LONGEST_TICK = 2.0  # where the judge itself did not run (a suspended machine), no more than this has passed
REMEDY = "The same command goes on from the newest whole checkpoint"


@dataclass
class Report:
    """What a guardian knows of its rank."""

    rank: int
    local_rank: int
    host: str
    pid: int
    count: int = 0  # beats so far: the same sequence on every rank, so the lowest is behind
    step: int = 0  # 1 is the first
    phase: str = "starting"
    limit: float = 0.0  # seconds that this phase may take
    state: str = RUNNING
    detail: str = ""  # the error
    where: str | None = None  # innermost Python call, once asked for
    waiting: bool = False  # that call is a collective

    def who(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"

    def place(self) -> str:
        return f"step {self.step} ({self.phase})" if self.step else f"its start ({self.phase})"


class Judge:
    """Collects the reports of ``size`` ranks and finds who is to blame.

    Args:
        size: ranks.
        silent: seconds without a report from a rank, after which it counts as lost.
        stacks: where the ranks' stacks will be, for the message.
    """

    def __init__(self, size: int, silent: float, stacks: str) -> None:
        self.size, self.silent, self.stacks = size, silent, stacks
        self.reports: dict[int, Report] = {}
        self.verdict: str | None = None
        self.clock = 0.0
        self._heard: dict[int, float] = {}
        self._since: dict[int, float] = {}  # when the rank came to where it is
        self._asked: float | None = None

    def tick(self, seconds: float) -> None:
        """Let time pass and judge."""
        self.clock += min(seconds, LONGEST_TICK)
        if self.verdict is None and not self.over:
            self.verdict = self._judge()

    def hear(self, report: Report) -> None:
        before = self.reports.get(report.rank)
        if before is None or (before.count, before.state) != (report.count, report.state):
            self._since[report.rank] = self.clock
        self.reports[report.rank] = report
        self._heard[report.rank] = self.clock

    @property
    def over(self) -> bool:
        """Every rank has ended by itself."""
        return len(self.reports) == self.size and all(r.state in (FAILED, REFUSED, DONE) for r in self._known())

    @property
    def wants_stacks(self) -> bool:
        return self._asked is not None

    def answer(self) -> dict[str, Any]:
        """What every guardian is told."""
        return {"verdict": self.verdict, "over": self.over, "stacks": self.wants_stacks}

    def _known(self) -> Iterator[Report]:
        return (self.reports[rank] for rank in sorted(self.reports))

    def _judge(self) -> str | None:
        return self._parted() or self._dead() or self._silent() or self._hung() or self._unexplained()

    def _dead(self) -> str | None:
        dead = [r for r in self._known() if r.state == DEAD]
        return f"{_each(dead)} was killed or crashed in {dead[0].place()}. All ranks end. {REMEDY}" if dead else None

    def _parted(self) -> str | None:
        """A rank ended by an error while others go on, or fell with it."""
        waiting = any(r.state in (LOST, DEAD) for r in self._known())
        for r in self._known():
            if r.state == FAILED and (waiting or self._age(r) > 1):
                return f"{r.who()} failed in {r.place()}: {r.detail}. All ranks end. {REMEDY}"
            if r.state == REFUSED and (waiting or self._age(r) > PARTING):
                return f"{r.who()} ended in {r.place()} by an error of its own, told there: {r.detail}. All ranks end"
        return None

    def _silent(self) -> str | None:
        late = [rank for rank in range(self.size) if rank not in self.reports]
        if late and self.clock > max(self.silent, LATEST_START):
            return f"{_ranks(late)} never started to train: see the messages of their hosts. All ranks end"
        quiet = [r for r in self._known() if r.state not in GONE and self.clock - self._heard[r.rank] > self.silent]
        if not quiet:
            return None
        hosts = groupby(sorted(quiet, key=lambda r: (r.host, r.rank)), key=lambda r: r.host)
        named = " and ".join(f"{_ranks([r.rank for r in ranks])} on {host}" for host, ranks in hosts)
        return (
            f"nothing heard from {named} for {self.silent:.0f} s, last in {quiet[0].place()}: the host is down, cut "
            f"off or frozen. All ranks end. {REMEDY}"
        )

    def _hung(self) -> str | None:
        active = [r for r in self._known() if r.state in (RUNNING, STOPPED)]
        if not active or len(self.reports) < self.size:
            return None
        if all(r.state == STOPPED for r in active):  # Ctrl-Z: not a fault
            self._since.update({r.rank: self.clock for r in active})
            return None
        least = min(r.count for r in active)
        behind = [r for r in active if r.count == least]  # the others may be waiting for these
        if not any(self._age(r) > r.limit for r in behind):
            self._asked = None
            return None
        if self._asked is None:
            self._asked = self.clock
        if any(r.where is None for r in behind) and self.clock - self._asked < STACK_SECONDS:
            return None
        busy = [r for r in behind if not r.waiting]  # where all are in one phase, some are in a collective there
        late = [r for r in busy if self._age(r) > r.limit]
        return self._named_as_hung(late or busy or behind, len(active))

    def _named_as_hung(self, late: list[Report], active: int) -> str:
        first = late[0]
        where = f" at {first.where}" if first.where else ""
        if len(late) == active > 1:
            text = f"no rank has moved for {self._age(first):.0f} s in {first.place()}; {first.who()} is{where}"
        elif first.state == STOPPED:
            text = f"{_each(late)} is stopped (SIGSTOP) in {first.place()}, for {self._age(first):.0f} s"
        else:
            limit = f"{self._age(first):.0f} s, allowed are {first.limit:.0f} s (hang_seconds)"
            text = f"{_each(late)} hangs in {first.place()}{where}: {limit}"
        return f"{text}. All ranks end, with their stacks in {self.stacks}. {REMEDY}"

    def _unexplained(self) -> str | None:
        for r in self._known():
            if r.state == LOST and self._age(r) > self.silent:
                return (
                    f"{r.who()} lost its connection to another rank in {r.place()}: {r.detail}. All ranks end. {REMEDY}"
                )
        return None

    def _age(self, report: Report) -> float:
        return self.clock - self._since[report.rank]


def unreachable(report: Report, address: str, seconds: float) -> str:
    """The verdict of a guardian that no longer reaches rank 0's."""
    return (
        f"rank 0 at {address} cannot be reached from {report.host} for {seconds:.0f} s, last in {report.place()} of "
        f"rank {report.rank}: its host, or this one, is down or cut off. The ranks of {report.host} end. {REMEDY}"
    )


def _each(reports: list[Report]) -> str:
    shown = ", ".join(r.who() for r in reports[:4])
    return shown + (f" and {len(reports) - 4} more" if len(reports) > 4 else "")


def _ranks(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0-7, 9``."""
    numbers = sorted(ranks)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"
