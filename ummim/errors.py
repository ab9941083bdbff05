"""Mistakes of the user, and the one place that turns them into a message and an exit code.

Exit codes (every command): 0 done, 2 the user's mistake (one message, no traceback), 1 ours, 130 after Ctrl-C and
143 after SIGTERM or SIGUSR1, both with a clean save where there is something to save, 141 the output's reader has gone.
"""

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from select import POLLERR, POLLHUP, poll
from signal import SIGPIPE
from typing import TextIO

EXIT_USER = 2
_UNUSABLE = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)


class UserError(Exception):
    """Something the user can mend. The message names the file or field, the value and the fix."""


class RecipeError(UserError):
    """A recipe that cannot run: unknown key, wrong type, or a combination that does not fit.

    ``key`` is the dotted recipe key at fault, if one is; whoever knows the file and the value adds them.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class DataError(UserError):
    """Shards, indices or images that cannot be read."""


class CheckpointError(UserError):
    """A checkpoint that is missing, torn, foreign, or does not fit the run."""


def describe(error: BaseException) -> str | None:
    """The one-line message for a user's mistake, or None if ``error`` is ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {os.fspath(error.filename)}" if error.filename else ""
        return f"disk full{where}: free some space and run the same command again; finished files are intact"
    if isinstance(error, OSError) and error.errno in _UNUSABLE and error.filename:
        return f"{os.fspath(error.filename)}: {error.strerror}: choose another path, or change its permissions"
    return None


def run_main(main: Callable[[], int | None]) -> int:
    """Run ``main`` and return its exit code; a user's mistake becomes one line on stderr and exit code 2, and an end
    for want of anybody who reads the output, as before ``| head``, a quiet 141."""
    try:
        code = main() or 0
        if sys.stdout is not None:  # which it is where the terminal was closed before
            sys.stdout.flush()
        return code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            drop_output()
            return 128 + SIGPIPE
        message = describe(error)
        if message is None:
            raise
        rank = os.environ.get("RANK", "0")
        prefix = "ummim: error: " if rank == "0" else f"ummim: rank {rank}: error: "
        say(prefix + message)
        return EXIT_USER


def drop_output() -> None:
    """From now on, what is printed goes nowhere; else Python complains at its end of what was not read."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_unread() -> bool:
    """Whether it is the output that is broken, and not some other pipe or socket."""
    output = poll()
    with suppress(OSError, ValueError):  # no file: a test's, or another program's that imports this
        output.register(sys.stdout.fileno(), 0)
    return any(event & (POLLERR | POLLHUP) for _, event in output.poll(0))


def say(line: str) -> None:
    """A line on stderr, see ``write_line``."""
    write_line(line, sys.stderr)


def write_line(line: str, stream: TextIO | None) -> None:
    """A line at once, unless the stream is closed. ``print`` writes its newline apart where ``PYTHONUNBUFFERED`` is
    set, as in many containers, and ranks that share a terminal would break into each other's lines."""
    if stream is not None:
        stream.write(f"{line}\n")
        stream.flush()
