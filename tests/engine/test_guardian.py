"""What one rank's guardian does; guardians of whole groups are in test_watchdog.py."""

import os
import signal
from dataclasses import replace

import pytest

from ummim.engine import guardian
from ummim.engine.guardian import BEAT, OTHERS, RECORD_SIZE, Guardian, Settings


@pytest.fixture
def settings() -> Settings:
    """Of a rank in step 7, which this process's parent stands for."""
    beats = os.memfd_create("beats")
    os.ftruncate(beats, RECORD_SIZE)
    os.pwrite(beats, BEAT.pack(1, 7, 60, b"forward"), 0)
    return Settings(0, 0, 2, os.getppid(), 4321, "here", "127.0.0.1", 0, 5.0, "run", 60.0, beats, beats, beats)


@pytest.mark.parametrize(("rank", "looks"), [(0, 1), (1, 1 + OTHERS)])
def test_a_hosts_first_rank_tells_of_the_launchers_death_and_the_others_leave_it_time_to(
    settings: Settings, rank: int, looks: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *call: asked.append(call))
    monkeypatch.setattr(guardian, "parent", lambda pid: 4321)
    watching = Guardian(replace(settings, rank=rank, local_rank=rank))
    watching.look()
    monkeypatch.setattr(guardian, "parent", lambda pid: 1)
    for _ in range(looks):
        assert not asked
        watching.look()
    watching.look()
    assert asked == [(os.getppid(), signal.SIGTERM)]  # once
    told = capfd.readouterr().err
    assert told.count("the launcher of rank 0 on here (process") == (rank == 0), told
