"""A rank's side of the watch over a run: it says where it is, and a guardian process looks after it.

Each rank has a guardian (``guardian.py``), to which the trainer's beats go through shared memory. Rank 0's guardian
hears all others and, where a rank is dead, hung, stopped or cut off, names it in one message (``verdict.py``); every
guardian then ends its rank. A launcher's death is answered with SIGTERM: all ranks save and end.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import asdict
from multiprocessing import active_children
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ummim.engine.guardian import BEAT, ENDING, RECORD_SIZE, Settings, tell_user
from ummim.engine.network import own_address
from ummim.engine.verdict import DONE, FAILED, LOST, REFUSED, REMEDY, RUNNING
from ummim.errors import UserError, describe

if TYPE_CHECKING:
    from ummim.engine.zero import World
    from ummim.run_config import RunConfig

START, RESTORE, READ, FORWARD, BACKWARD, AGREE, STEP, FIGURE, EVALUATE, SAVE = (
    "starting",
    "restoring",
    "reading data",
    "forward",
    "backward",
    "agreeing",
    "optimizer step",
    "figure",
    "evaluating",
    "checkpoint",
)
LONG = 1800.0  # seconds for what reads or writes whole checkpoints; also the process groups' timeout
COMPILING = 3600.0  # seconds for each phase of the first step, with torch.compile
FIRST = 10  # times hang_seconds: for each phase of the first step, in which memory is found and connections are made
SLOW = 5  # times the mean: what a phase may take if that is longer than hang_seconds
SILENT = 20.0  # seconds without a word from a rank's guardian, after which the rank counts as lost
LAUNCHED = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")  # set by torchrun, by deepspeed
LAUNCHER = os.getppid()  # as early as possible: it may die while we start
DETAIL = 200  # bytes kept of an error's text
LAST_WORD = 10.0  # seconds
SYMPTOMS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


class Watchdog:
    """``with Watchdog(recipe, world) as watchdog: ... watchdog.beat(step, FORWARD)``: every rank must enter.

    The block is watched until all ranks have left it. ``recipe.hang_seconds`` is how long a phase may take (0: nothing
    is watched): more in the first step, for checkpoints, for a server's data, and where it takes long on the average.
    An error that follows from another rank's end does not leave the block: the process ends when the cause is told.
    """

    def __init__(self, recipe: RunConfig, world: World, silent: float = SILENT) -> None:
        self.recipe, self.world, self.silent = recipe, world, silent
        self.watching = recipe.hang_seconds > 0
        self._limits = _limits(recipe)
        self._first_limit = COMPILING if recipe.compile else FIRST * recipe.hang_seconds
        self._memory = os.memfd_create("beats")
        os.ftruncate(self._memory, RECORD_SIZE)
        self._beats = mmap.mmap(self._memory, RECORD_SIZE)
        self._closed = False
        self._count, self._step, self._phase, self._began = 0, 0, START, time.monotonic()
        self._first_step = 0
        self._spent: dict[str, float] = defaultdict(float)  # seconds, by phase, after the first step
        self._times: Counter[str] = Counter()

    def beat(self, step: int, phase: str) -> None:
        """Say what comes next, in the same order on every rank. step: 1 is the first; 0: before it."""
        if not self.watching:
            return
        now = time.monotonic()
        if self._step > self._first_step > 0:
            self._spent[self._phase] += now - self._began
            self._times[self._phase] += 1
        self._first_step = self._first_step or step
        self._count, self._step, self._phase, self._began = self._count + 1, step, phase, now
        BEAT.pack_into(self._beats, 0, self._count, step, self._limit(), phase.encode())

    def _limit(self) -> float:
        limit = self._limits.get(self._phase, self.recipe.hang_seconds)
        if self._step <= self._first_step:
            return max(limit, self._first_limit)
        times = self._times[self._phase]
        return max(limit, SLOW * self._spent[self._phase] / times) if times else limit

    def __enter__(self) -> Watchdog:
        """Start this rank's guardian. Raises UserError if it cannot reach rank 0's."""
        if self.watching:
            self.beat(0, START)
            ENDING.pack_into(self._beats, BEAT.size, RUNNING.encode(), b"")
            address, port = "", 0
            if self.world.is_main:
                address = own_address() if self.world.size > 1 else ""
                port = self._start_guardian(address, port)
            if self.world.size > 1:
                address, port = _share([address, port])
            if not self.world.is_main:
                self._start_guardian(address, port)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self.watching:
            state, detail = _ending(error)
            if state == LOST and self.world.size > 1:
                self._await_verdict(detail)
            self._closed = True
            ENDING.pack_into(self._beats, BEAT.size, state.encode(), detail.encode()[:DETAIL])
        os.close(self._memory)

    def _start_guardian(self, address: str, port: int) -> int:
        """Start it; returns the port of rank 0's."""
        world, (order, leave) = self.world, os.pipe()
        settings = Settings(
            rank=world.rank,
            local_rank=world.local_rank,
            size=world.size,
            pid=os.getpid(),
            launcher=LAUNCHER if any(name in os.environ for name in LAUNCHED) else 0,
            host=socket.gethostname(),
            address=address,
            port=port,
            silent=self.silent,
            output=str(Path(self.recipe.output).resolve()),
            hang_seconds=self.recipe.hang_seconds,
            beats=self._memory,
            stacks=_stacks(),
            leave=leave,
        )
        package = str(Path(__file__).resolve().parents[2])
        found = os.environ.get("PYTHONPATH")
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ummim.engine.guardian", json.dumps(asdict(settings))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            pass_fds=(settings.beats, settings.stacks, leave),
            start_new_session=True,  # no launcher's or terminal's signal to the rank's group reaches it
            env={**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{found}" if found else package},
        )
        os.close(leave)
        assert process.stdout is not None
        with process.stdout as lines:
            answer = json.loads(lines.readline() or '{"error": "it could not be started"}')
        if "error" in answer:
            os.close(order)
            raise UserError(
                f"watchdog of rank {world.rank}: {answer['error']}: name the network interface in GLOO_SOCKET_IFNAME, "
                "open its ports between the hosts, or train without a watchdog by hang_seconds=0"
            )
        threading.Thread(target=self._obey, args=(order,), daemon=True).start()
        return int(answer["port"])

    def _obey(self, order: int) -> None:
        """End this process when its guardian says so, or dies."""
        told = os.read(order, 1)
        os.close(order)
        if not told:
            if self._closed:
                return
            tell_user(f"{self._who()}: its guardian process was killed; this rank ends")
        for worker in active_children():
            worker.kill()
        os._exit(1)

    def _await_verdict(self, detail: str) -> NoReturn:
        """Let the guardians find out whose end has broken the connection; they then end this process."""
        ENDING.pack_into(self._beats, BEAT.size, LOST.encode(), detail.encode()[:DETAIL])
        time.sleep(2 * self.silent + LAST_WORD)
        tell_user(f"{self._who()} lost its connection to another rank: {detail}. {REMEDY}")
        os._exit(1)

    def _who(self) -> str:
        return f"rank {self.world.rank} on {socket.gethostname()}, step {self._step} ({self._phase})"


def _limits(recipe: RunConfig) -> dict[str, float]:
    """The seconds that phases may take, other than ``hang_seconds``."""
    remote = "://" in recipe.data.shards
    reading = recipe.hang_seconds + (recipe.data.retry_seconds if remote else 0)
    longer = FIRST * recipe.hang_seconds
    return {START: LONG, RESTORE: LONG, SAVE: LONG, READ: reading, FIGURE: longer, EVALUATE: longer + reading}


def _ending(error: BaseException | None) -> tuple[str, str]:
    """How a block that ends with ``error`` counts, and in what words."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return DONE, ""
    told = describe(error)
    if told is not None or not isinstance(error, Exception):
        return REFUSED, told or f"exit {error}"
    first = next(iter(str(error).splitlines()), "")
    if isinstance(error, RuntimeError) and any(symptom in str(error) for symptom in SYMPTOMS):
        return LOST, first
    return FAILED, f"{type(error).__name__}: {first}"


def _share(value: list[Any]) -> list[Any]:
    """Rank 0's value, on every rank."""
    from torch.distributed import broadcast_object_list

    broadcast_object_list(value, src=0)
    return value


_memory: list[int] = []


def _stacks() -> int:
    """The file, in memory, to which SIGUSR2 makes this process write its stacks from now on."""
    if not _memory:
        _memory.append(os.memfd_create("stacks"))
        faulthandler.register(signal.SIGUSR2, file=_memory[0], all_threads=True)
    return _memory[0]
