"""Who is to blame, from what the guardians say: the judge alone, with a clock of its own."""

from dataclasses import replace
from typing import Any

import pytest

from ummim.engine import verdict
from ummim.engine.guardian import innermost
from ummim.engine.verdict import DEAD, DONE, FAILED, LOST, REFUSED, STOPPED, Judge, Report
from ummim.engine.watchdog import BACKWARD, FORWARD


def report(rank: int, **state: Any) -> Report:
    base = Report(rank, rank % 8, f"host-{rank // 8}", 100 + rank, count=10, step=4, phase=FORWARD, limit=45)
    return replace(base, **state)


class Hearing:
    """A judge and what the guardians say until told otherwise."""

    def __init__(self, *reports: Report) -> None:
        self.judge = Judge(len(reports), 20.0, "runs/x/stacks-*.txt")
        self.reports = {r.rank: r for r in reports}

    def pass_time(self, seconds: float, silent: tuple[int, ...] = ()) -> str | None:
        for _ in range(int(seconds)):
            for rank, each in self.reports.items():
                if rank not in silent:
                    if self.judge.wants_stacks and each.where is None:
                        self.reports[rank] = each = replace(each, where=f"file.py:{rank} call", waiting=each.pid < 0)
                    self.judge.hear(each)
            self.judge.tick(1.0)
        return self.judge.verdict


def test_the_rank_behind_is_blamed_not_those_that_wait_longer():
    hearing = Hearing(report(0, count=11, phase=BACKWARD, limit=5), report(1, limit=30))
    assert hearing.pass_time(29) is None
    told = hearing.pass_time(5)
    assert told is not None and told.startswith("rank 1 on host-0 (process 101) hangs in step 4 (forward) at file.py:1")


def test_in_the_same_phase_the_stacks_tell_who_waits():
    """Process ids below 0 stand for ranks in a collective."""
    hearing = Hearing(report(0, pid=-1), report(1), report(2, pid=-3))
    told = hearing.pass_time(50)
    assert told is not None and told.startswith("rank 1 on host-0 (process 101) hangs")


def test_where_all_wait_for_each_other_no_rank_is_blamed():
    told = Hearing(report(0, pid=-1), report(1, pid=-2)).pass_time(50)
    assert told is not None and told.startswith("no rank has moved for")


def test_progress_is_no_hang():
    hearing = Hearing(report(0), report(1))
    for count in range(11, 15):
        assert hearing.pass_time(40) is None
        hearing.reports = {rank: replace(r, count=count) for rank, r in hearing.reports.items()}


def test_a_host_that_falls_silent_is_named_with_all_its_ranks():
    hearing = Hearing(*(report(rank) for rank in range(16)))
    assert hearing.pass_time(5) is None
    silent = tuple(range(8, 16))
    assert hearing.pass_time(19, silent) is None
    told = hearing.pass_time(2, silent)
    assert told is not None and "nothing heard from ranks 8-15 on host-1 for 20 s, last in step 4 (forward)" in told


def test_a_rank_that_never_reports_is_missed():
    hearing = Hearing(report(0, limit=1e9), report(1))
    assert hearing.pass_time(verdict.LATEST_START, silent=(1,)) is None
    assert "rank 1 never started" in str(hearing.pass_time(2, silent=(1,)))


def test_a_suspended_machine_is_no_silence():
    hearing = Hearing(report(0), report(1))
    hearing.pass_time(1)
    hearing.judge.tick(3600)
    assert hearing.pass_time(1) is None


@pytest.mark.parametrize(
    ("states", "told"),
    [
        ((LOST, DEAD), "rank 1 on host-0 (process 101) was killed or crashed in step 4 (forward)"),
        ((LOST, FAILED), "rank 1 on host-0 (process 101) failed in step 4 (forward): KeyError"),
        ((LOST, REFUSED), "rank 1 on host-0 (process 101) ended in step 4 (forward) by an error of its own"),
        ((DEAD, REFUSED), "rank 1 on host-0 (process 101) ended in step 4"),  # the launcher has killed rank 0
    ],
)
def test_the_cause_is_told_not_the_symptom(states, told):
    hearing = Hearing(*(report(rank, state=state, detail="KeyError") for rank, state in enumerate(states)))
    assert str(hearing.pass_time(1)).startswith(told)


def test_a_broken_connection_without_a_cause_is_told_in_the_end():
    hearing = Hearing(report(0, limit=1e9), report(1, state=LOST, detail="Connection reset by peer"))
    assert hearing.pass_time(20) is None
    assert "rank 1 on host-0 (process 101) lost its connection" in str(hearing.pass_time(3))


def test_ranks_that_agree_to_end_have_time_to():
    hearing = Hearing(report(0), report(1, state=REFUSED))
    assert hearing.pass_time(verdict.PARTING) is None
    hearing.reports[0] = report(0, state=REFUSED)
    assert hearing.pass_time(100) is None and hearing.judge.over


def test_a_rank_that_is_done_is_not_waited_for():
    hearing = Hearing(report(0, state=DONE), report(1, count=20, limit=100))
    assert hearing.pass_time(99) is None and not hearing.judge.over


def test_a_stopped_rank_among_running_ones_is_named():
    told = Hearing(report(0, count=11), report(1, state=STOPPED)).pass_time(50)
    assert told is not None and told.startswith("rank 1 on host-0 (process 101) is stopped (SIGSTOP) in step 4")


def test_the_innermost_call_is_the_main_threads():
    text = (
        'Thread 0x01 (most recent call first):\n  File "/a/watchdog.py", line 5 in _obey\n\n'
        'Current thread 0x02 (most recent call first):\n  File "/lib/torch/distributed/c10d.py", line 9 in wait\n'
        '  File "/a/trainer.py", line 1 in fit\n'
    )
    assert innermost(text) == ("/lib/torch/distributed/c10d.py:9 wait", True)
    assert innermost(text.replace("torch/distributed", "x")) == ("/lib/x/c10d.py:9 wait", False)
    assert innermost("") == ("", False)
