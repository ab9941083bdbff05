"""Worker processes of a loader: their death is one error, and none outlives the trainer."""

import atexit
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from ummim.errors import DataError


def start_worker(number: int) -> None:
    """Leave Ctrl-C and preemption to the trainer, which saves first; for ``DataLoader(worker_init_fn=...)``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def supervised(batches: Any) -> Iterator[None]:
    """Watch over the workers of ``batches``, an iterator of a ``DataLoader``, and end them on leaving.

    Raises:
        DataError: a worker was killed. On the main thread the error comes at once, whatever the trainer is doing;
            PyTorch's own handler, which this one replaces, does the same with a RuntimeError.
    """
    workers: Sequence[BaseProcess] = getattr(batches, "_workers", ())
    if not workers:  # the trainer reads by itself
        yield
        return
    kill = partial(_kill, workers)
    atexit.register(kill)  # they ignore the SIGTERM by which multiprocessing would end them
    handled = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD)
    if handled:
        signal.signal(signal.SIGCHLD, partial(_raise_if_dead, workers))
    try:
        yield
    except (OSError, EOFError, RuntimeError):
        ended = wait([worker.sentinel for worker in workers], timeout=1)
        for worker in workers:
            if worker.sentinel in ended:  # its files are closed, but it may not be gone yet
                worker.join()
        _raise_if_dead(workers)
        raise
    finally:
        if handled:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        batches._shutdown_workers()  # or they would live as long as a traceback that refers to ``batches``
        kill()
        atexit.unregister(kill)
        if handled:
            signal.signal(signal.SIGCHLD, before)


def _raise_if_dead(workers: Sequence[BaseProcess], number: int = 0, frame: FrameType | None = None) -> None:
    for worker in workers:
        if worker.exitcode:
            how = f"killed by {signal.Signals(-worker.exitcode).name}" if worker.exitcode < 0 else "ended"
            raise DataError(
                f"data worker process {worker.pid} was {how}: the machine may have run out of memory, or of shared "
                "memory (/dev/shm): lower data.workers or micro_batch"
            ) from None


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()
