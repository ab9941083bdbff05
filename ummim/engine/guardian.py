"""The process that watches one rank: ``python -m ummim.engine.guardian SETTINGS``, started by ``watchdog.Watchdog``.

It is a process, not a thread: it goes on while the rank is stopped, hangs in C code or is dead, and it can kill it.
It has a session of its own and ignores the launchers' signals. Rank 0's guardian also listens for the others and
judges (``verdict.Judge``); each of them sends a line of JSON a second and is answered with one. Standard library
only: it starts in a tenth of a second and takes 20 MB.
"""

import asyncio
import contextlib
import json
import mmap
import os
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ummim.engine import verdict
from ummim.engine.verdict import DEAD, DONE, GONE, RUNNING, STOPPED, Judge, Report

LOOK = 0.25  # seconds between two looks at the rank
OTHERS = 4  # looks that a host's other ranks leave its first one to tell that the launcher is gone, and to end
SEND = 1.0  # seconds between two reports
ANSWER = 5.0  # seconds that an answer may take
FIRST_CONTACT = 30.0  # seconds to reach rank 0's guardian at the start
LINGER = 5.0  # seconds that rank 0's guardian waits for the others to hear the verdict
LEAVE = 2.0  # seconds that a rank has to leave by itself, before it is killed
TRACEBACK = 5.0  # the same for one that is telling an error
BEAT = struct.Struct("=QQd24s")  # what the rank writes: count, step, limit, phase
ENDING = struct.Struct("=8s200s")  # and after it: state, detail
RECORD_SIZE = BEAT.size + ENDING.size
WAITS = ("/torch/distributed/", "/deepspeed/")  # where the innermost Python call lies while a collective runs


@dataclass
class Settings:
    """What a rank tells its guardian; file descriptors are inherited."""

    rank: int
    local_rank: int
    size: int
    pid: int
    launcher: int  # process id; 0: started by hand
    host: str
    address: str  # of rank 0's guardian; for rank 0: the address to listen on
    port: int
    silent: float
    output: str
    hang_seconds: float
    beats: int  # shared memory
    stacks: int  # shared memory, into which SIGUSR2 makes the rank write its stacks
    leave: int  # pipe: a byte makes the rank leave


class Guardian:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.beats = mmap.mmap(settings.beats, RECORD_SIZE, prot=mmap.PROT_READ)
        self.report = Report(settings.rank, settings.local_rank, settings.host, settings.pid)
        self.judge = Judge(settings.size, settings.silent, f"{settings.output}/stacks-*.txt")
        self.answer: dict[str, Any] = self.judge.answer()
        self.told: set[int] = {0}  # ranks that know the end
        self.met = False  # rank 0's guardian has answered
        self.unheard = 0.0  # seconds since it did
        self.stacks = b""
        self.orphaned = 0  # looks since the rank's launcher is gone
        self.changed = asyncio.Event()

    async def watch(self) -> None:
        """Look at the rank until all have ended or one has failed; then end it."""
        settings, before = self.settings, time.monotonic()
        self.look()
        if settings.rank == 0:
            server = await asyncio.start_server(self.serve, settings.address, 0) if settings.size > 1 else None
            tell_rank({"port": server.sockets[0].getsockname()[1] if server else 0})
        else:
            sender = asyncio.create_task(self.send())
        while True:
            await asyncio.sleep(LOOK)
            now = time.monotonic()
            elapsed, before = min(now - before, verdict.LONGEST_TICK), now
            self.look()
            if settings.rank == 0:
                self.judge.hear(self.report)
                self.judge.tick(elapsed)
                self.answer = self.judge.answer()
            elif sender.done():
                sender.result()  # it has failed
            elif self.cut_off(elapsed):
                return await self.end_alone()
            if self.answer["stacks"] and self.report.where is None and self.report.state in (RUNNING, STOPPED):
                self.show()
            if self.answer["verdict"]:
                return await self.end(self.answer["verdict"], tell=settings.rank == 0)
            if self.answer["over"]:
                return await self.linger()

    def cut_off(self, elapsed: float) -> bool:
        """Let time pass; says whether rank 0's guardian has not answered for too long."""
        self.unheard += elapsed
        return self.unheard > (self.settings.silent if self.met else FIRST_CONTACT)

    async def end_alone(self) -> None:
        """Without rank 0's guardian: end the rank, or have it tell that it cannot start."""
        address = f"{self.settings.address} port {self.settings.port}"
        if not self.met:
            tell_rank({"error": f"rank 0's watchdog at {address} cannot be reached from {self.settings.host}"})
        elif self.report.state != DONE:
            text = verdict.unreachable(self.report, address, self.unheard)
            await self.end(text, tell=self.settings.local_rank == 0)

    def look(self) -> None:
        """Bring the report up to date."""
        count, step, limit, *words = *BEAT.unpack_from(self.beats), *ENDING.unpack_from(self.beats, BEAT.size)
        phase, state, detail = (word.rstrip(b"\0").decode(errors="replace") for word in words)
        old, settings = self.report, self.settings
        new = replace(old, count=count, step=step, limit=limit, phase=phase, state=state, detail=detail)
        if count != old.count:
            new.where, new.waiting = None, False
        gone = os.getppid() != settings.pid
        if state == RUNNING and gone:
            new.state = DEAD
        elif state == RUNNING and process_state(settings.pid) in ("T", "t"):
            new.state, new.limit = STOPPED, settings.hang_seconds
        if settings.launcher and not gone and parent(settings.pid) not in (settings.launcher, None):
            self.orphaned += 1
        if self.orphaned > (OTHERS if settings.local_rank else 0):
            self.orphaned = settings.launcher = 0
            if settings.local_rank == 0:
                tell_user(f"the launcher of {new.who()} is gone in {new.place()}: all ranks save and end")
            with contextlib.suppress(ProcessLookupError):
                os.kill(settings.pid, signal.SIGTERM)
        self.report = new
        if new.state != old.state:
            self.changed.set()

    def show(self) -> None:
        """Have the rank write its stacks, and read from them where it is."""
        descriptor = self.settings.stacks
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.settings.pid, signal.SIGUSR2)
        size, deadline = 0, time.monotonic() + 1
        while time.monotonic() < deadline:
            time.sleep(0.1)
            if size and os.fstat(descriptor).st_size == size:
                break
            size = os.fstat(descriptor).st_size
        self.stacks = os.pread(descriptor, size, 0)
        self.report.where, self.report.waiting = innermost(self.stacks.decode(errors="replace"))
        self.changed.set()

    async def send(self) -> None:
        """Report to rank 0's guardian, and take its answers."""
        while True:
            with contextlib.suppress(OSError, ValueError):  # time is up, or the connection has ended
                await self.converse()
            await asyncio.sleep(SEND)

    async def converse(self) -> None:
        async with asyncio.timeout(ANSWER):
            reader, writer = await asyncio.open_connection(self.settings.address, self.settings.port)
        with contextlib.closing(writer):
            while True:
                self.changed.clear()
                writer.write(json.dumps(asdict(self.report)).encode() + b"\n")
                async with asyncio.timeout(ANSWER):
                    self.answer = json.loads(await reader.readline())
                if not self.met:
                    tell_rank({"port": self.settings.port})
                self.met, self.unheard = True, 0.0
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SEND):
                        await self.changed.wait()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hear one other guardian until it closes."""
        with contextlib.suppress(OSError, ValueError, TypeError), contextlib.closing(writer):
            while line := await reader.readline():
                report = Report(**json.loads(line))
                self.judge.hear(report)
                answer = self.judge.answer()
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
                if answer["verdict"] or answer["over"]:
                    self.told.add(report.rank)

    async def end(self, text: str, tell: bool) -> None:
        """Tell the verdict, take the rank's stacks and end it."""
        if tell:
            tell_user(text)
        state, pid = self.report.state, self.settings.pid
        if state in (RUNNING, STOPPED) and self.report.where is None:
            self.show()
        writing = threading.Thread(target=self.write_stacks, daemon=True)  # a file system that hangs must not stop us
        writing.start()
        if state in GONE:
            await self.gone(TRACEBACK)
        with contextlib.suppress(OSError):
            os.write(self.settings.leave, b"x")
        if not await self.gone(0 if state == STOPPED else LEAVE):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await self.linger()
        writing.join(LEAVE)

    def write_stacks(self) -> None:
        if self.stacks:
            with contextlib.suppress(OSError):
                Path(self.settings.output, f"stacks-{self.settings.rank}.txt").write_bytes(self.stacks)

    async def gone(self, seconds: float) -> bool:
        """Wait for the rank to be gone; says whether it is."""
        deadline = time.monotonic() + seconds
        while os.getppid() == self.settings.pid:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(LOOK / 5)
        return True

    async def linger(self) -> None:
        """Rank 0's: let all others hear how it ended."""
        deadline = time.monotonic() + LINGER
        while self.settings.rank == 0 and len(self.told) < len(self.judge.reports) and time.monotonic() < deadline:
            await asyncio.sleep(LOOK)


def innermost(stacks: str) -> tuple[str, bool]:
    """The main thread's innermost Python call in faulthandler's text, and whether any thread is in a collective."""
    calls = list(_innermost_calls(stacks))
    waiting = any(any(part in call for part in WAITS) for call in calls)
    return (calls[-1] if calls else "", waiting)


def _innermost_calls(stacks: str) -> Iterator[str]:
    lines = stacks.splitlines()
    for header, line in zip(lines, lines[1:], strict=False):
        if header.endswith("(most recent call first):") and line.startswith('  File "'):
            name, _, rest = line.removeprefix('  File "').partition('", line ')
            number, _, function = rest.partition(" in ")
            yield f"{name}:{number} {function}"


def process_state(pid: int) -> str | None:
    """The letter of ``/proc/PID/stat``; None if there is no such process."""
    return _stat(pid, 0)


def parent(pid: int) -> int | None:
    found = _stat(pid, 1)
    return None if found is None else int(found)


def _stat(pid: int, field: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[field]
    except (OSError, IndexError):
        return None


def tell_rank(message: dict[str, Any]) -> None:
    """The one line that the rank waits for at its start."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


def tell_user(text: str) -> None:
    with contextlib.suppress(OSError):  # the launcher may have taken the terminal with it
        os.write(2, f"ummim: {text}\n".encode())


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(guard(Settings(**json.loads(sys.argv[1]))))


async def guard(settings: Settings) -> None:
    """Watch, and end at once: nothing may keep this process, neither a connection nor a thread that writes."""
    code = 1
    try:
        await Guardian(settings).watch()
        code = 0
    except Exception:
        traceback.print_exc()
    os._exit(code)


if __name__ == "__main__":
    main()
