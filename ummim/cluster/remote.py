"""Probes on many hosts at once, each at the far end of an ssh or srun process."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ummim.cluster.hosts import Host
from ummim.errors import UserError

SSH_OPTIONS = (
    "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3",
)  # fmt: skip
_LINE = 2**20  # bytes an answer may have
# What a probe needs of this machine's environment; ssh passes nothing on by itself.
_PASSED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME",
           "NCCL_IB_HCA", "TMPDIR")  # fmt: skip


class HostError(UserError):
    """A host that does not answer; the message says why."""


def ssh_options() -> list[str]:
    """pdsh's ssh options if there are any (``PDSH_SSH_ARGS_APPEND``), so that both go the same way; else ours."""
    return shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")) or list(SSH_OPTIONS)


def ssh_command(host: Host, words: Sequence[str]) -> list[str]:
    """The argv that runs ``words`` on ``host`` in this folder, with this machine's environment where it matters."""
    variables = [f"{name}={os.environ[name]}" for name in _PASSED if name in os.environ]
    line = f"cd {shlex.quote(str(Path.cwd()))} && exec env {shlex.join([*variables, *words])}"  # ssh takes one string
    return ["ssh", *ssh_options(), host.name, line]


def srun_command(host: Host, words: Sequence[str]) -> list[str]:
    """The same within a Slurm job."""
    return ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host.name}", "--export=ALL", *words]


class Probe:
    """The near end of one host's probe. Every error is a HostError."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @staticmethod
    async def start(command: Sequence[str]) -> Probe:
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, stderr=pipe, limit=_LINE, start_new_session=True
            )
        except FileNotFoundError:
            raise HostError(f"{command[0]} is not installed here") from None
        return Probe(process)

    async def ask(self, what: str, seconds: float, **values: Any) -> Any:
        """One request and its answer within ``seconds``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"ask": what, "with": values}).encode() + b"\n")
            await self._process.stdin.drain()
            line = await asyncio.wait_for(self._process.stdout.readline(), seconds)
        except (BrokenPipeError, ConnectionResetError):
            line = b""
        except TimeoutError:
            raise HostError(f"gives no answer within {seconds:.0f} s") from None
        if not line:
            raise HostError(await self._obituary())
        reply = json.loads(line)
        if "error" in reply:
            raise HostError(reply["error"])
        return reply["answer"]

    async def _obituary(self) -> str:
        """Why there is no answer, from what the process printed last."""
        assert self._process.stderr is not None
        try:
            errors = await asyncio.wait_for(self._process.stderr.read(), 10)
            code = await asyncio.wait_for(self._process.wait(), 10)
        except TimeoutError:
            return "closed the connection"
        lines = [line.strip() for line in errors.decode(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit code {code}"
        if code == 255:  # ssh's own
            return f"cannot be reached by ssh: {last}"
        return f"ssh works, but {sys.executable} -m ummim.cluster.probe does not: {last}"

    async def close(self) -> None:
        """End the probe: it sees the end of its input; the ssh process is killed if that does not do."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 5)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
