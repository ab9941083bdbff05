"""Work in parallel processes, results in order, a bounded number of jobs in flight."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from ummim.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")


def ordered(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """``map`` over ``workers`` processes (below 2: in this one). Memory stays flat: few results wait.

    Raises:
        DataError: a process was killed, as the kernel does when memory runs out.
    """
    if workers < 2:
        yield from map(function, jobs)
        return
    executor = ProcessPoolExecutor(workers, initializer=_start)
    waiting: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            waiting.append(executor.submit(function, job))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, perhaps because memory ran out: run again with fewer --workers"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _start() -> None:
    """Ctrl-C is the parent's to handle; and a worker ends with its parent, even one killed with SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
