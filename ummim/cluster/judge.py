"""What is wrong with hosts, from their facts; pure functions and the table for the user."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ummim.cluster.facts import Facts
from ummim.cluster.hosts import Host

GIB = 2**30
CLOCK_SECONDS = 2.0  # between hosts: more than that, and file times and certificates go wrong
LEAST_FREE = GIB  # on every disk that the job writes to but the output's


@dataclass
class Checked:
    """One host on its way through the checks.

    Attributes:
        host: its name and slots; 0 slots where the launcher does not tell.
        facts: its answers; None if there are none.
        clock: seconds that its clock is ahead of this machine's.
        tolerance: by how much the way there blurs ``clock``, seconds.
        faults: what is wrong with it, each with a remedy.
    """

    host: Host
    facts: Facts | None = None
    clock: float = 0.0
    tolerance: float = 0.0
    faults: list[str] = field(default_factory=list)


def judge(checked: Sequence[Checked], here: Facts, free_output: int, workers: int) -> None:
    """Write into each host's ``faults`` what is wrong with it, beside ``here``, the launching machine.

    Args:
        checked: the hosts; those without facts have their fault already.
        here: the launching machine's own facts.
        free_output: bytes that must be free in the output folder.
        workers: the recipe's loader processes, which pass images through shared memory.
    """
    answered = [(entry, entry.facts) for entry in checked if entry.facts is not None]
    index = next((facts.index for facts in (here, *(facts for _, facts in answered)) if facts.index), "")
    gpus = max((len(facts.gpus) for _, facts in answered), default=0)
    for entry, facts in answered:
        entry.faults += _code(facts, here)
        if facts.data_error:
            entry.faults.append(f"the shards cannot be read there: {facts.data_error}")
        elif facts.index != index:
            entry.faults.append(
                f"its shards' index has digest {facts.index[:12]}, not {index[:12]}: copy the same shards there"
            )
        if facts.output_error:
            entry.faults.append(f"the output folder cannot be written there: {facts.output_error}")
        elif not facts.sees_token:
            entry.faults.append(
                "does not see what this machine writes into the output folder: name an output on a file system that "
                "all hosts share"
            )
        if abs(entry.clock) > CLOCK_SECONDS + entry.tolerance:
            side = "ahead of" if entry.clock > 0 else "behind"
            entry.faults.append(f"its clock is {abs(entry.clock):.1f} s {side} this machine's: set it by NTP")
        entry.faults += _disks(facts.free, free_output, workers)
        wanted = max(entry.host.slots, 1)
        if gpus and (len(facts.gpus) < wanted or (not entry.host.slots and len(facts.gpus) < gpus)):
            entry.faults.append(
                f"sees {len(facts.gpus)} GPUs, {entry.host.slots or gpus} are expected: look at nvidia-smi there, or "
                "correct the hostfile"
            )


def _code(facts: Facts, here: Facts) -> list[str]:
    if _base(facts.commit) != _base(here.commit):
        return [f"its code is at commit {_short(facts.commit)}, here {_short(here.commit)}: check out the same one"]
    if facts.source != here.source:
        return [f"its code differs from here at the same commit {_short(here.commit)}: copy the same files there"]
    other = {name: found for name, found in facts.versions.items() if found != here.versions[name]}
    if other:
        listed = ", ".join(f"{name} {found or 'missing'}, here {here.versions[name]}" for name, found in other.items())
        return [f"other versions than here ({listed}): install the same constraints.txt"]
    return []


def _disks(free: Mapping[str, int], free_output: int, workers: int) -> list[str]:
    least = dict.fromkeys(free, LEAST_FREE) | {"output": free_output}
    if not workers:
        least.pop("shared memory", None)
    return [
        f"only {free[name] / GIB:.1f} GiB are free for {name}, {wanted / GIB:.1f} GiB are wanted: free some space"
        for name, wanted in least.items()
        if free[name] < wanted
    ]


def table(checked: Sequence[Checked]) -> str:
    """A line per host, the details of the failing ones not included."""
    rows: list[tuple[str, ...]] = [
        ("host", "slots", "GPUs", "commit", "torch", "deepspeed", "index", "clock", "free", "")
    ]
    for entry in checked:
        verdict = "FAILS" if entry.faults else "ok"
        facts = entry.facts
        if facts is None:
            rows.append((entry.host.name, str(entry.host.slots or ""), *[""] * 7, verdict))
            continue
        rows.append(
            (
                entry.host.name,
                str(entry.host.slots or ""),
                str(len(facts.gpus)),
                _short(facts.commit),
                facts.versions["torch"] or "missing",
                facts.versions["deepspeed"] or "missing",
                facts.index[:8],
                f"{entry.clock:+.2f} s",
                f"{facts.free['output'] / GIB:.0f} GiB",
                verdict,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _base(commit: str | None) -> str | None:
    """The commit below changes that are not committed: what they do to the package, its digest tells."""
    return None if commit is None else commit.partition("+")[0]


def _short(commit: str | None) -> str:
    if commit is None:
        return "none"
    digits, plus, _ = commit.partition("+")
    return digits[:8] + plus
