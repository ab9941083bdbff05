"""Worker processes: replaced when they die, and never longer there than the trainer."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from tests.conftest import ROOT
from tests.data.pictures import is_running
from tests.data.test_loader import Arithmetic, by_key, loader
from ummim.errors import DataError


@pytest.mark.parametrize("start", [0, 5])
def test_a_killed_worker_is_replaced_and_no_sample_lost_doubled_or_moved(
    folder: Path, arithmetic: Arithmetic, start: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed while the trainer waits for a batch or is busy, at the beginning, in the middle and at the end."""
    plan = arithmetic(2, 1, 2, stop=12)
    whole = by_key(list(loader(folder, plan, start=start)))
    batches, found = iter(loader(folder, plan, workers=2, start=start)), []
    for i in range((12 - start) * 2):
        found.append(next(batches))
        if i in (0, 7, (12 - start) * 2 - 1):
            victim = multiprocessing.active_children()[i % 2]
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
            if i == 7:
                victim.join()
    assert list(batches) == []
    assert by_key(found) == whole
    told = [re.sub(r"worker \d+ ", "worker PID ", record.getMessage()) for record in caplog.records]
    assert told == [
        f"data worker PID killed by SIGKILL, restarting ({n} of 3): the machine may have run out of memory, or of "
        "shared memory (/dev/shm): lower data.workers or micro_batch"
        for n in (1, 2)
    ]
    assert not multiprocessing.active_children()


def test_workers_that_die_again_and_again_are_an_error_and_not_a_hang(folder: Path, arithmetic: Arithmetic) -> None:
    many = loader(folder, arithmetic(1, 1, 2, stop=100_000), workers=2)
    assert many.restarts == 3
    batches = iter(many)
    for _ in range(4):
        next(batches)
        worker = multiprocessing.active_children()[0]
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    with pytest.raises(DataError, match=f"data worker {worker.pid} killed by SIGKILL: .* lower data.wor"):
        next(batches)
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_as_it_starts_is_replaced(
    folder: Path, arithmetic: Arithmetic, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started, original = [], DataLoader.__iter__

    def start(self: DataLoader):
        started.append(signal.getsignal(signal.SIGCHLD))
        if len(started) == 1:
            raise RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed.")  # PyTorch's own handler
        return original(self)

    monkeypatch.setattr(DataLoader, "__iter__", start)
    before = signal.getsignal(signal.SIGCHLD)
    assert by_key(list(loader(folder, arithmetic(1, 1, 8), workers=1))) == by_key(
        list(loader(folder, arithmetic(1, 1, 8)))
    )
    assert [record.getMessage()[:56] for record in caplog.records] == [
        "data worker killed as it started, restarting (1 of 3): t"
    ]
    assert signal.getsignal(signal.SIGCHLD) == before


def test_a_dead_worker_does_not_disturb_what_the_trainer_is_doing(folder: Path, arithmetic: Arithmetic) -> None:
    batches = iter(loader(folder, arithmetic(1, 1, 2, stop=100), workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while worker.is_alive():
        assert time.monotonic() < deadline
    next(batches)
    batches.close()  # type: ignore[attr-defined]


def test_a_crash_elsewhere_does_not_hang_on_workers_at_exit(folder: Path) -> None:
    script = (
        "import sys\n"
        "from types import SimpleNamespace\n"
        "from ummim.data import *\n"
        "from ummim.masking import *\n"
        "plan = SimpleNamespace(accumulation=1, micro_batch=2, global_batch=2, steps_per_epoch=13, stop_step=10**6)\n"
        "data = DataConfig(sys.argv[1], workers=2, image_size=32)\n"
        "sampler = PlanSampler((4, 4), MaskConfig())\n"
        "batches = iter(build_loader(ShardIndex.open(sys.argv[1]), data, sampler, 0, plan, 0, 1))\n"
        "next(batches)\n"
        "sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], timeout=60, cwd=ROOT)
    assert done.returncode == 7


def test_ctrl_c_and_preemption_are_left_to_the_trainer(folder: Path, arithmetic: Arithmetic) -> None:
    batches = iter(loader(folder, arithmetic(1, 1, 2, stop=2000), workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    for kind in (signal.SIGINT, signal.SIGTERM):
        assert worker.pid is not None
        os.kill(worker.pid, kind)
        for _ in range(20):
            next(batches)
    assert worker.is_alive()
    batches.close()  # type: ignore[attr-defined]
    worker.join(10)
    assert not worker.is_alive()


def test_leaving_early_ends_the_workers(folder: Path, arithmetic: Arithmetic) -> None:
    for _ in loader(folder, arithmetic(1, 1, 2, stop=100_000), workers=2):
        break
    assert not multiprocessing.active_children()


def test_workers_end_with_a_trainer_that_is_killed(folder: Path) -> None:
    script = (
        "import multiprocessing, sys, time\n"
        "from types import SimpleNamespace\n"
        "from ummim.data import *\n"
        "from ummim.masking import *\n"
        "plan = SimpleNamespace(accumulation=1, micro_batch=2, global_batch=2, steps_per_epoch=13, stop_step=10**6)\n"
        "data = DataConfig(sys.argv[1], workers=2, image_size=32)\n"
        "sampler = PlanSampler((4, 4), MaskConfig())\n"
        "for batch in build_loader(ShardIndex.open(sys.argv[1]), data, sampler, 0, plan, 0, 1):\n"
        "    print(*(p.pid for p in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as trainer:
        assert trainer.stdout is not None
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        trainer.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "worker processes outlive the trainer"
        time.sleep(0.1)
