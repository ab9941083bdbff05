"""Interruptions and failures that every rank must answer in the same way."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ummim.errors import EXIT_USER, UserError, describe

if TYPE_CHECKING:
    from ummim.engine.zero import World

T = TypeVar("T")

EXIT_INTERRUPT = 130  # Ctrl-C, after a clean save
EXIT_PREEMPTED = 143  # SIGTERM or SIGUSR1, after a clean save
PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)  # schedulers send either some time before they kill
ECHO_SECONDS = 2.0  # the terminal and torchrun both pass on the one Ctrl-C


class Interrupts:
    """Turns signals into a flag while the block runs: ``with Interrupts() as interrupts: ... interrupts.code``.

    The first Ctrl-C, SIGTERM or SIGUSR1 asks for a save at the end of the optimizer step; a second Ctrl-C ends
    the process at once. Once all ranks ``leave``, a SIGTERM or SIGUSR1 says nothing new, and is ignored from then on.
    """

    def __init__(self) -> None:
        self.code = 0
        self._leaving = False
        self._first = 0.0
        self._pid = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, *PREEMPTIONS):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self._leaving and number in PREEMPTIONS else handler)

    def leave(self) -> None:
        """All ranks have saved and end: a signal that reaches this one later than others must not kill it now."""
        self._leaving = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked loader worker: it goes on feeding the step that is under way
        if number in PREEMPTIONS:
            self.code = EXIT_PREEMPTED
        elif self.code == EXIT_INTERRUPT and time.monotonic() - self._first > ECHO_SECONDS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(self._pid, signal.SIGINT)
        elif self.code == 0:
            self.code, self._first = EXIT_INTERRUPT, time.monotonic()


class Agreement(NamedTuple):
    """What all ranks know of an optimizer step."""

    loss: float  # mean over the ranks
    stop: int  # the exit code that any rank asks for; 0: none
    faults: int  # samples that could not be read, on all ranks
    lost: bool  # a rank had nothing to put in a bad sample's place
    saving: int  # ranks that still write a checkpoint


def agree(loss: Tensor, code: int, faults: Sequence[Any], saving: bool, world: World) -> Agreement:
    """Share one rank's ``loss`` (), exit code, unreadable samples, and whether it still writes a checkpoint.

    One small all-reduce per optimizer step: all ranks save and stop after the same one.
    """
    sums = torch.zeros(6, dtype=torch.float64 if world.device.type == "cpu" else torch.float32, device=world.device)
    sums[0] = loss.detach()
    sums[1] = code == EXIT_PREEMPTED
    sums[2] = code == EXIT_INTERRUPT
    sums[3] = sum(fault.attempt == 0 for fault in faults)
    sums[4] = any(fault.replacement is None for fault in faults)
    sums[5] = saving
    dist.all_reduce(sums)
    total, preempted, interrupted, unread, lost, writing = sums.tolist()
    stop = EXIT_PREEMPTED if preempted else EXIT_INTERRUPT if interrupted else 0
    return Agreement(total / world.size, stop, int(unread), lost > 0, int(writing))


def agreed_stop(code: int, world: World) -> int:
    """The exit code that any rank asks for; 0: none. Every rank must call it."""
    asked = torch.tensor([code == EXIT_PREEMPTED, code == EXIT_INTERRUPT], dtype=torch.float32, device=world.device)
    dist.all_reduce(asked)
    preempted, interrupted = asked.tolist()
    return EXIT_PREEMPTED if preempted else EXIT_INTERRUPT if interrupted else 0


def raise_together(error: Exception, world: World) -> NoReturn:
    """Raise ``error`` on rank 0 and end the others quietly: one message. Every rank must call it."""
    if world.is_main:
        raise error
    sys.exit(EXIT_USER)


def on_every_rank(function: Callable[[], T], world: World) -> T:
    """Run ``function`` on every rank and give its result. If it ends by a user's mistake on any of them, the first
    such rank tells and all end: for what each rank does for itself, such as reading a file that one node may lack.
    """
    error: Exception | None = None
    try:
        result = function()
    except Exception as caught:
        if describe(caught) is None:
            raise
        error = caught
    failed = [False] * world.size
    dist.all_gather_object(failed, error is not None)
    if not any(failed):
        return result
    if error is not None and failed.index(True) == world.rank:
        raise error
    sys.exit(EXIT_USER)


def on_main(function: Callable[[], T], world: World) -> T:
    """Run ``function`` on rank 0 and give its result, or its end by a user's mistake, to every rank."""
    outcome: list[Any] = [None, False]
    error: Exception | None = None
    if world.is_main:
        try:
            outcome[0] = function()
        except Exception as caught:
            if describe(caught) is None:
                raise
            error, outcome[1] = caught, True
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1]:
        raise_together(error or UserError(""), world)
    return outcome[0]
