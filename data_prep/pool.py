"""Work in parallel processes, results in order, a bounded number of jobs in flight."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from ummim.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")

_REFRESH = 0.25  # seconds between two looks at the counter
_advance: Callable[[int], object] | None = None  # reports what a job of this process has done


def ordered(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int, bar: tqdm | None = None
) -> Generator[Result, None, None]:
    """``map`` over ``workers`` processes (below 2: in this one). Memory stays flat: few results wait.

    ``bar`` advances by what ``function`` reports through ``advance``.

    Raises:
        DataError: a process was killed, as the kernel does when memory runs out.
    """
    global _advance
    if workers < 2:
        _advance = bar.update if bar is not None else None
        yield from map(function, jobs)
        return
    counter = multiprocessing.Value("q", 0)
    executor = ProcessPoolExecutor(workers, initializer=_start, initargs=(counter,))
    waiting: deque[Future[Result]] = deque()
    begin = bar.n if bar is not None else 0
    try:
        for job in jobs:
            waiting.append(executor.submit(function, job))
            if len(waiting) > 3 * workers:
                yield _result(waiting.popleft(), bar, begin, counter)
        while waiting:
            yield _result(waiting.popleft(), bar, begin, counter)
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, perhaps because memory ran out: run again with fewer --workers"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def advance(count: int) -> None:
    """Called by a job: ``count`` more are done of what the bar counts."""
    if _advance is not None:
        _advance(count)


def _result(future: Future[Result], bar: tqdm | None, begin: int, counter: Any) -> Result:
    while bar is not None:
        done = wait([future], _REFRESH).done
        bar.update(begin + counter.value - bar.n)
        if done:
            break
    return future.result()


def _start(counter: Any) -> None:
    """Ctrl-C is the parent's to handle; and a worker ends with its parent, even one killed with SIGKILL."""
    global _advance

    def add(count: int) -> None:
        with counter.get_lock():
            counter.value += count

    _advance = add
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
