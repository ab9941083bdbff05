"""What runs have written down: faults, bad steps, starts, checkpoints, recipes and where they differ, environments."""

import json
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from ummim.report.html import esc, heading, named, note, section, size_text, table
from ummim.report.read import Checkpoint, Run, flatten

SHOWN = 20  # rows of a table whose file holds all
_MISSING = object()
_NAMES = ("name", "description", "output")  # differ between any two runs


def events(runs: Sequence[Run]) -> str:
    """Starts, faults, bad steps and checkpoints, run beside run."""
    columns = []
    for i, run in enumerate(runs):
        parts = [_starts(run), _faults(run), _bad_steps(run), _checkpoints(run)]
        if run.stacks:
            names = ", ".join(path.name for path in run.stacks)
            parts.append(note(f"The watchdog has left stack traces: {names}.", bad=True))
        if run.aside:
            parts.append(note(f"Files from before a fresh start: {', '.join(path.name for path in run.aside)}."))
        columns.append(f"<div>{heading(i, run.label)}{''.join(parts)}</div>")
    return section("events", "Faults, restarts and checkpoints", f'<div class="columns">{"".join(columns)}</div>')


def recipes(runs: Sequence[Run]) -> str:
    """The keys in which the recipes differ, and each recipe in full."""
    parts = []
    if len(runs) > 1:
        flat = [flatten(run.recipe) for run in runs]
        names = by_section(name for each in flat for name in each if name not in _NAMES)
        differing = [name for name in names if len({plain(each.get(name, _MISSING)) for each in flat}) > 1]
        header = ["Key", *(named(i, run.label) for i, run in enumerate(runs))]
        rows = [
            [f"<code>{esc(name)}</code>", *(plain(each.get(name, _MISSING)) for each in flat)] for name in differing
        ]
        parts.append(table(header, rows) if rows else note("The recipes do not differ."))
    for i, run in enumerate(runs):
        text = yaml.safe_dump(run.recipe, sort_keys=False) if run.recipe else run.notes.get("recipe.yaml", "")
        summary = f"<summary>{named(i, run.label)}: recipe.yaml in full</summary>"
        parts.append(f"<details>{summary}<pre>{esc(text)}</pre></details>")
    return section("recipes", "What differs between the recipes" if len(runs) > 1 else "Recipe", *parts)


def environments(runs: Sequence[Run]) -> str:
    """Versions, commit, ranks and data of the newest start of each run; rows that differ are marked."""
    flat = []
    for run in runs:
        told = {name: value for name, value in run.environment.items() if name not in ("command", "earlier")}
        flat.append({name.removeprefix("packages."): value for name, value in flatten(told).items()})
    names = list(dict.fromkeys(name for each in flat for name in each))
    cells = [[plain(each.get(name, _MISSING)) for each in flat] for name in names]
    marked = [i for i, row in enumerate(cells) if len(set(row)) > 1 and names[i] != "started"]
    header = ["", *(named(i, run.label) for i, run in enumerate(runs))]
    rows = [[esc(name), *row] for name, row in zip(names, cells, strict=True)]
    body = table(header, rows, marked=marked) if rows else note("No environment.json to read.")
    return section("environment", "Environment", body)


def evaluations(runs: Sequence[Run]) -> str:
    """What ``evaluation.json`` holds, where there is one; else nothing."""
    found = [(i, run, flatten(run.evaluation)) for i, run in enumerate(runs) if run.evaluation]
    if not found:
        return ""
    names = list(dict.fromkeys(name for _, _, each in found for name in each))
    header = ["", *(named(i, run.label) for i, run, _ in found)]
    rows = [[esc(name), *(plain(each.get(name, _MISSING)) for _, _, each in found)] for name in names]
    return section("evaluation", "Evaluation", table(header, rows))


def commands(runs: Sequence[Run]) -> str:
    """How to go on with each run, and how to take its weights along."""
    parts = [note("From the folder in which the run was started; on any number of ranks, under any launcher.")]
    for i, run in enumerate(runs):
        given = run.environment.get("command")
        words = [str(word) for word in given[1:]] if isinstance(given, list) else []
        words = [word for word in words if not word.startswith("--local_rank")] or [str(run.folder / "recipe.yaml")]
        export = ["ummim", "export", str(run.folder), f"{run.folder.resolve().name}.safetensors"]
        lines = f"python train.py {shlex.join(words)}\n{shlex.join(export)}"
        parts.append(f"{heading(i, run.label)}<pre>{esc(lines)}</pre>")
    return section("commands", "Go on from here", *parts)


def by_section(names: Iterable[str]) -> list[str]:
    """Dotted keys, each once, in the order in which they and their sections first come."""
    unique = list(dict.fromkeys(names))
    sections = list(dict.fromkeys(name.rpartition(".")[0] for name in unique))
    return sorted(unique, key=lambda name: sections.index(name.rpartition(".")[0]))


def plain(value: Any) -> str:
    """A value of a recipe or an environment as HTML."""
    if value is _MISSING:
        return '<span class="quiet">&ndash;</span>'
    text = value if isinstance(value, str) and value else json.dumps(value)
    return f"<code>{esc(text)}</code>"


def _starts(run: Run) -> str:
    starts = run.starts()
    if len(starts) < 2:
        return note("Started once." if starts else "No start on record.")
    rows = []
    for number, each in enumerate(starts, start=1):
        commit, _, changes = str(each.get("git_commit") or "").partition("+")
        told = [each.get("started"), each.get("world_size"), each.get("device"), commit[:12] + "+" * bool(changes)]
        rows.append([str(number), *(esc(text) for text in told)])
    return note(f"Started {len(starts)} times:") + table(["Start", "When", "Ranks", "Device", "Commit"], rows)


def _faults(run: Run) -> str:
    bad = [fault for fault in run.faults if fault.get("attempt", 0) == 0]
    if not bad:
        return note("No data faults.")
    names = ("step", "shard", "key", "byte", "reason", "replacement")
    rows = [[esc("" if fault.get(name) is None else fault[name]) for name in names] for fault in bad[:SHOWN]]
    text = f"Samples that could not be read: {len(bad)}" + (f". The first {SHOWN}:" if len(bad) > SHOWN else "")
    return note(text, bad=True) + table(["Step", "Shard", "Key", "Byte", "Reason", "Read instead"], rows)


def _bad_steps(run: Run) -> str:
    kept = "".join(
        f'<p class="quiet">Kept of a bad step: <code>ummim replay {esc(shlex.quote(str(path)))}</code></p>'
        for path in run.bundles
    )
    if not run.bad_steps:
        return note("No steps left out.") + kept
    rows = []
    for step, entry in sorted(run.bad_steps.items())[:SHOWN]:
        listed = entry.get("keys")
        keys = [str(each) for each in listed] if isinstance(listed, list) else []
        shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        rows.append([str(step), esc(entry.get("reason", "")), esc(shown)])
    text = f"Steps left out: {len(run.bad_steps)}" + (f". The first {SHOWN}:" if len(run.bad_steps) > SHOWN else "")
    return note(text, bad=True) + table(["Step", "Why", "Samples"], rows) + kept


def _checkpoints(run: Run) -> str:
    if not run.checkpoints:
        return note("No checkpoint yet.")
    rows = [_checkpoint(each) for each in run.checkpoints]
    return table(["Checkpoint", "Epoch", "Size", ""], rows, numbers=(1, 2))


def _checkpoint(each: Checkpoint) -> list[str]:
    epoch = "" if each.epoch is None else f"{each.epoch:.2f}"
    words = [word for word, fits in (("stays", each.stays), ("all weights in one file", each.whole_weights)) if fits]
    state = f'<span class="bad">{esc(each.wrong)}</span>' if each.wrong else esc(", ".join(words))
    return [f"<code>{esc(each.path.name)}</code>", epoch, size_text(each.size) if each.size else "", state]
