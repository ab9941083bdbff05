"""``ummim preflight``: every host is looked at before the job, all at once, and the one that fails is named."""

from __future__ import annotations

import asyncio
import secrets
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ummim.cluster.facts import TOKEN, Facts, Question, gather
from ummim.cluster.hosts import Host
from ummim.cluster.judge import Checked, judge, table
from ummim.cluster.reduce import Reduction
from ummim.cluster.remote import HostError, Probe
from ummim.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ummim.run_config import RunConfig

FACTS_SECONDS = 180.0  # importing torch over a slow network file system takes a minute and more
CLOCK_SECONDS = 10.0
REDUCE_SECONDS = 150.0

Command = Callable[[Host, Sequence[str]], list[str]]


class Passed(NamedTuple):
    """All hosts are fit."""

    report: str  # the table, and the all-reduce's numbers
    address: str  # of the first host, for the rendezvous; the name of a single one that was not asked for it


def preflight(
    recipe: RunConfig, hosts: Sequence[Host], command: Command, master: str | None, port: int, free_output: int
) -> Passed:
    """Check ``hosts`` for ``recipe``.

    Args:
        recipe: what they shall train.
        hosts: all of the job; the first one holds rank 0.
        command: makes the argv that runs words on a host: ``ssh_command`` or ``srun_command``.
        master: address of the first host for the rendezvous; None: the one it was reached by.
        port: of the rendezvous.
        free_output: bytes that must be free in the output folder.

    Raises:
        UserError: naming every host that fails, and why.
    """
    with _token(Path(recipe.output)) as token:
        return asyncio.run(_check(recipe, hosts, command, master, port, free_output, token))


@contextmanager
def _token(output: Path) -> Iterator[str]:
    """The name of a file in the output folder while the block runs."""
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{TOKEN}{secrets.token_hex(8)}"
    path.write_text(f"written by ummim preflight on {socket.gethostname()}\n")
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)
        for folder in made:  # innermost first; a run that was never started leaves no folder
            if not any(folder.iterdir()):
                folder.rmdir()


async def _check(
    recipe: RunConfig, hosts: Sequence[Host], command: Command, master: str | None, port: int, free: int, token: str
) -> Passed:
    checked = [Checked(host) for host in hosts]
    probes: dict[str, Probe] = {}
    question = Question.about(recipe.data, recipe.output, token)
    try:
        asking = [asyncio.create_task(_ask(entry, probes, command, question)) for entry in checked]
        here = await asyncio.to_thread(gather, question)
        await asyncio.gather(*asking)
        judge(checked, here, free, recipe.data.workers)
        report = table(checked)
        _refuse(checked, report)
        if len(hosts) == 1:
            return Passed(report, master or _reached(checked[0]) or hosts[0].name)
        address = master or await _address(checked, probes)
        return Passed(f"{report}\n{await _reduce(checked, probes, address, port, report)}", address)
    finally:
        await asyncio.gather(*(probe.close() for probe in probes.values()))


async def _ask(entry: Checked, probes: dict[str, Probe], command: Command, question: Question) -> None:
    """One host's facts and clock."""
    try:
        probe = await Probe.start(command(entry.host, [sys.executable, "-m", "ummim.cluster.probe"]))
        probes[entry.host.name] = probe
        facts = Facts(**await probe.ask("facts", FACTS_SECONDS, **asdict(question)))
        asked = time.time()
        theirs = await probe.ask("clock", CLOCK_SECONDS)
        answered = time.time()
    except HostError as error:
        entry.faults.append(str(error))
        return
    entry.facts = facts
    entry.clock, entry.tolerance = theirs - (asked + answered) / 2, (answered - asked) / 2


async def _reduce(checked: Sequence[Checked], probes: dict[str, Probe], address: str, port: int, report: str) -> str:
    """The all-reduce between all hosts; a line with its numbers."""
    size = len(checked)

    async def one(rank: int, entry: Checked) -> Reduction | None:
        try:
            values = {"master": address, "port": port, "rank": rank, "size": size}
            return Reduction(**await probes[entry.host.name].ask("reduce", REDUCE_SECONDS, **values))
        except HostError as error:
            entry.faults.append(f"the all-reduce fails: {error}")
            return None

    measured = await asyncio.gather(*(one(rank, entry) for rank, entry in enumerate(checked)))
    _refuse(checked, report)
    slowest = min((one for one in measured if one is not None), key=lambda one: one.bandwidth)
    return describe_reduction(slowest, size, f"{address}:{port}")


async def _address(checked: Sequence[Checked], probes: dict[str, Probe]) -> str:
    """The first host's address as the others can use it.

    That is the one it was reached by, unless it was reached from itself or by srun, which has no address: Debian
    resolves a host's own name to a loopback address.
    """
    (first, second), place = checked[:2], _reached(checked[0])
    try:
        if place:
            return place
        if towards := _reached(second):
            return str(await probes[first.host.name].ask("address", CLOCK_SECONDS, place=towards))
        return str(await probes[second.host.name].ask("resolve", CLOCK_SECONDS, place=first.host.name))
    except HostError as error:
        raise UserError(f"no address of {first.host.name} can be found ({error}): give it with --master-addr") from None


def _reached(entry: Checked) -> str:
    address = "" if entry.facts is None else entry.facts.address
    return "" if address.startswith("127.") or address == "::1" else address


def describe_reduction(found: Reduction, size: int, place: str) -> str:
    """One line."""
    via = f"{found.backend} over {found.interface}" if found.interface and found.backend == "gloo" else found.backend
    return (
        f"all-reduce over {size} hosts ({via}, {place}): {found.latency * 1e3:.2f} ms for 4 bytes, "
        f"{found.bandwidth / 1e6:.0f} MB/s at 16 MiB"
    )


def _refuse(checked: Sequence[Checked], report: str) -> None:
    """Raise for hosts with faults."""
    failing = [entry for entry in checked if entry.faults]
    if failing:
        lines = [f"  {entry.host.name}: {fault}" for entry in failing for fault in entry.faults]
        print(report, flush=True)
        raise UserError(f"{len(failing)} of {len(checked)} hosts cannot take part:\n" + "\n".join(lines))
