"""Worker processes of a loader: their death is noticed at once, and none outlives the trainer."""

import atexit
import gc
import signal
import threading
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from ummim.errors import DataError

REMEDY = "the machine may have run out of memory, or of shared memory (/dev/shm): lower data.workers or micro_batch"


class WorkerDied(DataError):
    """A worker process is dead; ``how`` tells by what."""

    def __init__(self, how: str) -> None:
        self.how = how
        super().__init__(f"data worker {how}: {REMEDY}")


def start_worker(number: int) -> None:
    """Leave Ctrl-C and preemption to the trainer, which saves first; for ``DataLoader(worker_init_fn=...)``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Supervised:
    """The batches of a ``DataLoader``, whose workers are watched; a context manager that starts and ends them.

    ``next`` raises ``WorkerDied`` as soon as one is dead (in threads other than the main one, after seconds), and
    nothing does between two calls; PyTorch's own handler, which this one replaces, would raise a RuntimeError in the
    midst of whatever the trainer is doing.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.workers: Sequence[BaseProcess] = ()  # none: the trainer reads by itself
        self.waiting = False

    def __enter__(self) -> "Supervised":
        """Start the workers. Raises ``WorkerDied``."""
        self._handled = self.loader.num_workers > 0 and threading.current_thread() is threading.main_thread()
        self._before = signal.getsignal(signal.SIGCHLD)
        try:
            if self._handled:
                signal.signal(signal.SIGCHLD, self._on_death)
            gc.freeze()  # else a garbage collection in a worker writes to, and so copies, all it shares with us
            self.batches: Any = iter(self.loader)
            if self._handled:
                signal.signal(signal.SIGCHLD, self._on_death)  # the first loader of a process sets PyTorch's
        except RuntimeError as error:
            if self._handled:
                signal.signal(signal.SIGCHLD, self._before)
            if "DataLoader worker" in str(error):
                raise WorkerDied("killed as it started") from None
            raise
        finally:
            gc.unfreeze()
        self.workers = getattr(self.batches, "_workers", ())
        self._kill = partial(_kill, self.workers)
        atexit.register(self._kill)  # they ignore the SIGTERM by which multiprocessing would end them
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handled:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self.workers:
            self.batches._shutdown_workers()  # or they would live as long as a traceback that refers to them
        self._kill()
        atexit.unregister(self._kill)
        if self._handled:
            signal.signal(signal.SIGCHLD, self._before)

    def next(self) -> Any:
        """The next batch."""
        self.waiting = True
        try:
            self._raise_if_dead()
            return next(self.batches)
        except (OSError, EOFError, RuntimeError):
            ended = wait([worker.sentinel for worker in self.workers], timeout=1)
            for worker in self.workers:
                if worker.sentinel in ended:  # its files are closed, but it may not be gone yet
                    worker.join()
            self._raise_if_dead()
            raise
        finally:
            self.waiting = False

    def _on_death(self, number: int, frame: FrameType | None) -> None:
        if self.waiting:  # else the next ``next`` finds out
            self._raise_if_dead()

    def _raise_if_dead(self) -> None:
        for worker in self.workers:
            if code := worker.exitcode:
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                raise WorkerDied(f"{worker.pid} {how}") from None


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()
