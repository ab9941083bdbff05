"""What a run's folder holds, read as far as it can be: the run may be in progress, stopped anywhere, or broken."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ummim.engine import bad_steps
from ummim.engine.checkpoint import FOLDER, MANIFEST, STATE, WEIGHTS, steps
from ummim.engine.metrics import FILE
from ummim.errors import UserError

FIGURES = "reconstructions"
_SIGNS = ("recipe.yaml", "environment.json", FILE, FOLDER, FIGURES)  # with one of them a folder is a run's
_UNREADABLE = (OSError, ValueError, RecursionError)


class Sample(NamedTuple):
    """A metric's value at a logged step."""

    step: float
    epoch: float | None
    value: float | None  # None: not finite


@dataclass(frozen=True)
class Checkpoint:
    """A ``step-N`` folder. ``wrong`` is told by names and sizes alone: tensors are not read here."""

    path: Path
    step: int
    epoch: float | None
    size: int  # bytes
    stays: bool
    whole_weights: bool
    wrong: str | None


@dataclass(frozen=True)
class Run:
    """A run's files.

    Attributes:
        folder: where it is.
        label: its name; where several runs share it, with as much of the path as tells them apart.
        recipe, environment, evaluation: the plain values of ``recipe.yaml``, ``environment.json`` and
            ``evaluation.json``; empty where there is none to read.
        metrics: the records of ``metrics.jsonl`` in order of their steps; numbers only, None where not finite.
        written: when that file was last written, in seconds since 1970.
        faults: the records of all ``data_faults`` files.
        bad_steps: the records of ``bad_steps.jsonl`` by step.
        bundles: folders in ``bad_steps``: what ``ummim replay`` reruns.
        checkpoints: oldest first.
        figures: the reconstruction figures by epoch.
        stacks: what the watchdog left: stack traces of ranks that hung.
        aside: folders of files from before a start that did not go on from them.
        notes: what is missing or cannot be read, by the file's name.
    """

    folder: Path
    label: str
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, float | None]] = field(default_factory=list)
    written: float | None = None
    faults: list[dict[str, Any]] = field(default_factory=list)
    bad_steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    bundles: list[Path] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    figures: list[tuple[int, Path]] = field(default_factory=list)
    stacks: list[Path] = field(default_factory=list)
    aside: list[Path] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def metric_names(self) -> list[str]:
        """The names of its metrics, in the order in which they first come."""
        return list(dict.fromkeys(key for record in self.metrics for key in record))

    def series(self, key: str) -> list[Sample]:
        """A metric over the run; the records that do not have it are left out."""
        return [Sample(r["step"] or 0, r.get("epoch"), r[key]) for r in self.metrics if key in r]

    def last(self, key: str) -> float | None:
        """A metric's newest value, if there is one."""
        return next((r[key] for r in reversed(self.metrics) if r.get(key) is not None), None)

    def starts(self) -> list[dict[str, Any]]:
        """What ``environment.json`` tells of every start, oldest first."""
        earlier = self.environment.get("earlier")
        before = [each for each in earlier if isinstance(each, dict)] if isinstance(earlier, list) else []
        return [*before, self.environment] if self.environment else []

    def steps_per_epoch(self) -> float | None:
        """Optimizer steps in an epoch, from the newest record."""
        for record in reversed(self.metrics):
            if record.get("epoch") and record["step"]:
                return record["step"] / (record["epoch"] or 1)
        return None

    def stop_step(self) -> int | None:
        """Where the run ends, if its recipe and a record tell."""
        per_epoch, epochs = self.steps_per_epoch(), number(self.recipe.get("epochs"))
        if per_epoch is None or epochs is None:
            return None
        most = number(self.recipe.get("max_steps"))
        return round(per_epoch * epochs if most is None else min(per_epoch * epochs, most))


def read_runs(folders: list[Path]) -> list[Run]:
    """Read each folder once, with labels that differ. Raises UserError for a folder that is no run's."""
    unique = list({folder.resolve(): folder for folder in folders}.values())
    runs = [read_run(folder) for folder in unique]
    for label in (lambda run: run.label, lambda run: run.folder.resolve().name, lambda run: str(run.folder)):
        names = [label(run) for run in runs]
        if len(set(names)) == len(names):
            break
    return [_renamed(run, name) for run, name in zip(runs, names, strict=True)]


def read_run(folder: Path) -> Run:
    """Read a run's folder. Raises UserError if it is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give the folder of a run, its recipe's output")
    if not any((folder / name).exists() for name in _SIGNS):
        raise UserError(f"{folder}: is no run's folder: it has none of {', '.join(_SIGNS)}")
    notes: dict[str, str] = {}
    recipe = _mapping(folder / "recipe.yaml", yaml.safe_load, notes)
    metrics, written = _metrics(folder / FILE, notes)
    if not steps(folder / FOLDER):
        notes[FOLDER] = "no checkpoint yet"
    return Run(
        folder,
        str(recipe.get("name") or folder.resolve().name),
        recipe,
        _mapping(folder / "environment.json", json.loads, notes),
        _mapping(folder / "evaluation.json", json.loads, notes) if (folder / "evaluation.json").exists() else {},
        metrics,
        written,
        [record for path in sorted(folder.glob("data_faults*.jsonl")) for record in _lines(path, notes)],
        _bad_steps(folder / bad_steps.FILE, notes),
        sorted(path for path in folder.glob(f"{bad_steps.FOLDER}/step-*") if path.is_dir()),
        [_checkpoint(path) for path in reversed(steps(folder / FOLDER))],
        _figures(folder / FIGURES),
        sorted(folder.glob("stacks-*.txt")),
        sorted(folder.glob("before-*")),
        notes,
    )


def number(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _renamed(run: Run, label: str) -> Run:
    return Run(**{**vars(run), "label": label})


def _mapping(path: Path, parse: Callable[[str], Any], notes: dict[str, str]) -> dict[str, Any]:
    try:
        values = parse(path.read_text())
        if isinstance(values, dict):
            plain: dict[str, Any] = json.loads(json.dumps(values, default=str, skipkeys=True))  # fails for a circle
            return plain
        notes[path.name] = f"holds no keys and values, but {type(values).__name__}"
    except FileNotFoundError:
        notes[path.name] = "missing"
    except (*_UNREADABLE, yaml.YAMLError) as error:
        notes[path.name] = f"cannot be read: {' '.join(str(error).split())[:200]}"
    return {}


def _lines(path: Path, notes: dict[str, str]) -> list[dict[str, Any]]:
    """The whole records of a file with one a line; notes how many lines are none."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        notes[path.name] = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        return []
    records, torn = [], []
    for place, line in enumerate(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            torn.append(place)
    if torn == [len(lines) - 1]:
        notes[path.name] = "its last line is not whole: it is being written, or was when the run was killed"
    elif torn:
        notes[path.name] = f"{len(torn)} of {len(lines)} lines cannot be read"
    return records


def _metrics(path: Path, notes: dict[str, str]) -> tuple[list[dict[str, float | None]], float | None]:
    records = [
        {key: number(value) for key, value in record.items() if value is None or isinstance(value, (int, float))}
        for record in _lines(path, notes)
    ]
    kept = [record for record in records if record.get("step") is not None]
    if not kept:
        notes.setdefault(path.name, "holds no step yet")
    elif len(kept) < len(records):
        notes.setdefault(path.name, f"{len(records) - len(kept)} of {len(records)} lines have no step")
    try:
        written = path.stat().st_mtime
    except OSError:
        written = None
    return sorted(kept, key=lambda record: record["step"] or 0), written


def _bad_steps(path: Path, notes: dict[str, str]) -> dict[int, dict[str, Any]]:
    try:
        return bad_steps.read(path)
    except (OSError, OverflowError, RecursionError) as error:
        notes[path.name] = f"cannot be read: {error}"
        return {}


def _checkpoint(path: Path) -> Checkpoint:
    wrong, size, state, listing = None, 0, {}, {}
    try:
        listing = json.loads((path / MANIFEST).read_text())["files"]
        state = json.loads((path / STATE).read_text())
        short = [name for name, each in listing.items() if (path / name).stat().st_size != each["size"]]
        size = sum(each["size"] for each in listing.values())
        wrong = f"{', '.join(short)} cut short" if short else None
    except FileNotFoundError as error:
        wrong = f"{Path(error.filename).name} is missing"
    except (*_UNREADABLE, KeyError, TypeError, AttributeError) as error:
        wrong = f"its {MANIFEST} or {STATE} cannot be used ({type(error).__name__})"
    state = state if isinstance(state, dict) else {}
    epoch, stays = number(state.get("epoch")), state.get("milestone") is True
    return Checkpoint(path, int(path.name[5:]), epoch, size, stays, WEIGHTS in listing, wrong)


def _figures(folder: Path) -> list[tuple[int, Path]]:
    found = [(path.stem.removeprefix("epoch-"), path) for path in folder.glob("epoch-*.png")]
    return sorted((int(epoch), path) for epoch, path in found if epoch.isdecimal())
