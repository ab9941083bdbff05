"""Whole files from wherever they lie: tried again while there is hope, resumed where they broke off, checksummed."""

import hashlib
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ummim.data.faults import SourceDown
from ummim.data.remote import Interrupted, OtherFile, Refused, read_range, stream
from ummim.data.urls import shown

Value = TypeVar("Value")

log = logging.getLogger(__name__)

_STALL_SECONDS = 30.0  # without a byte, after which a connection counts as broken
_LONGEST_PAUSE = 30.0
_SAME_ANSWERS = 3  # a file is not the one looked for when it is the same other one so many times
_PIECE = 1 << 20
_jitter = random.Random()  # noqa: S311  (of its own: the global one belongs to the training)


class Stopped(Exception):
    """The download is not wanted any more."""


@dataclass
class Patience:
    """How long to go on: pauses of 0.5, 1, 2 ... 30 s (times a random 0.5 to 1) until ``seconds`` without progress."""

    seconds: float
    stopped: Callable[[], bool] = lambda: False
    remedy: str = "check the server and the network, or raise data.retry_seconds"
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    pauses: int = field(default=0, init=False)
    since: float = field(init=False)

    def __post_init__(self) -> None:
        self.since = self.clock()

    @property
    def stall(self) -> float:
        """Seconds without a byte after which a connection counts as broken."""
        return min(_STALL_SECONDS, max(self.seconds, 1.0)) if self.seconds else _STALL_SECONDS

    def progress(self) -> None:
        """Bytes came that had not come before. Raises Stopped."""
        self.since, self.pauses = self.clock(), 0
        if self.stopped():
            raise Stopped

    def pause(self, location: str, reason: str) -> bool:
        """Wait before another attempt; False if the time is over."""
        left = self.seconds - (self.clock() - self.since)
        if left <= 0:
            return False
        if self.pauses == 0:
            log.warning("%s: %s; trying again for up to %g s", shown(location), reason, self.seconds)
        self.sleep(min(min(0.5 * 2**self.pauses, _LONGEST_PAUSE) * _jitter.uniform(0.5, 1), left))
        self.pauses += 1
        return True


def persist(read: Callable[[], Value], location: str, patience: Patience) -> Value:
    """``read()``, again while it is interrupted and there is patience.

    Raises:
        Refused: the server has no such file for us.
        SourceDown: the patience is over.
    """
    while True:
        try:
            return read()
        except Interrupted as error:
            if not patience.pause(location, str(error)):
                raise SourceDown(gave_up(location, str(error), patience)) from None


def fetch_file(location: str, patience: Patience) -> bytes:
    """All bytes of a small file. Raises like ``persist``."""
    return persist(lambda: b"".join(stream(location, 0, None, patience.stall)), location, patience)


def fetch_range(location: str, start: int, length: int, patience: Patience) -> bytes:
    """``length`` bytes from ``start`` on, fewer at the end of the file. Raises like ``persist``."""
    return persist(lambda: read_range(location, start, length, patience.stall), location, patience)


def gave_up(location: str, reason: str, patience: Patience) -> str:
    """The message at the end of all patience."""
    seconds = patience.seconds
    tried = f"given up after {seconds:g} s of trying without progress" if seconds else "tried once"
    return f"{shown(location)}: {reason} ({tried}): {patience.remedy}"


def download(
    location: str,
    part: Path,
    sha256: str,
    size: int | None,
    patience: Patience,
    write: Callable[[int, bytes], None],
) -> int:
    """Complete the file ``part``, which may hold its beginning already, and return a file descriptor of it.

    Args:
        location: a path or URL.
        part: where to; whoever calls holds the lock on it.
        sha256: what the whole file's checksum must be (hex).
        size: what its size must be in bytes, if that is known.
        patience: when to stop trying.
        write: writes all the bytes to a file descriptor.

    Raises:
        Refused: the server has no such file, or another one.
        Interrupted: the patience is over; what has come is kept for the next time.
        Stopped, OSError: of ``patience`` and ``write``.
    """
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    furthest, others = 0, [""]
    try:
        while True:
            try:
                _receive(location, descriptor, sha256, size, patience, write, furthest)
                return descriptor
            except Interrupted as error:
                furthest = max(furthest, os.fstat(descriptor).st_size)
                if isinstance(error, OtherFile):
                    os.ftruncate(descriptor, 0)
                    others = [*others, str(error)] if others[-1] == str(error) else [str(error)]
                    if len(others) == _SAME_ANSWERS:
                        raise Refused(str(error)) from None
                if not patience.pause(location, str(error)):
                    raise
    except BaseException:
        os.close(descriptor)
        raise


def _receive(
    location: str,
    descriptor: int,
    sha256: str,
    size: int | None,
    patience: Patience,
    write: Callable[[int, bytes], None],
    furthest: int,
) -> None:
    """One attempt, from where the file ends."""
    digest = hashlib.sha256()
    reached = os.lseek(descriptor, 0, os.SEEK_SET)
    while piece := os.read(descriptor, _PIECE):
        digest.update(piece)
        reached += len(piece)
    if size is None or reached < size:
        for piece in stream(location, reached, size, patience.stall):
            write(descriptor, piece)
            digest.update(piece)
            reached += len(piece)
            if reached > furthest:
                patience.progress()
            if size is not None and reached > size:
                raise OtherFile(f"it is longer there than the {size} bytes that its index says")
    if size is not None and reached < size:
        raise Interrupted(f"it ended after {reached} of {size} bytes")
    if digest.hexdigest() != sha256:
        raise OtherFile(f"its checksum is {digest.hexdigest()}, its index says {sha256}: damaged or made anew")
