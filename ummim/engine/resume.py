"""Where a run goes on from: the newest whole checkpoint, a named one, or a clean start."""

from __future__ import annotations

import json
import logging
import pickle
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ummim.engine.checkpoint import FOLDER, MANIFEST, STATE, RunState, fault, remove_leftovers, steps
from ummim.engine.faults import on_main
from ummim.errors import CheckpointError

if TYPE_CHECKING:
    from ummim.engine.zero import World
    from ummim.recipe import Recipe
    from ummim.run_plan import RunPlan

log = logging.getLogger(__name__)

RUN_FILES = (FOLDER, "metrics.jsonl", "recipe.yaml", "environment.json", "reconstructions", "tensorboard")


def newest_valid(folder: Path) -> Path | None:
    """The newest whole step folder in ``folder``; says in the log what is wrong with each that it passes over."""
    passed: list[str] = []
    for checkpoint in steps(folder):
        wrong = fault(checkpoint)
        if wrong is None:
            if passed:
                log.warning("%s; using %s", "; ".join(passed), checkpoint.name)
            return checkpoint
        passed.append(f"{checkpoint.name}: {wrong}")
    if passed:
        raise CheckpointError(
            f"{folder}: no checkpoint is whole ({'; '.join(passed)}): restore the files, or remove the folder or "
            "name another output to start afresh"
        )
    return None


def find(resume: str, output: Path) -> Path | None:
    """The step folder to go on from (None: start afresh) for ``resume``: auto, never, or a path.

    A path is a step folder, a run's folder, or its ``checkpoints``. Raises CheckpointError where a run would be
    mixed with another one: a path older than the output's own newest. ``never`` sets an earlier run aside.
    """
    own = output / FOLDER
    newest = next(iter(steps(own)), None)
    if resume == "auto":
        return newest_valid(own)
    if resume == "never":
        set_aside(output)
        return None
    path = Path(resume)
    if (path / MANIFEST).is_file() or path.name.startswith("step-"):
        wrong = fault(path) if path.is_dir() else "no such folder"
        if wrong:
            raise CheckpointError(f"resume={resume}: {wrong}: name another checkpoint, or use resume=auto")
        found: Path | None = path
    else:
        found = newest_valid(path / FOLDER if (path / FOLDER).is_dir() else path)
    if found is None:
        raise CheckpointError(f"resume={resume}: no checkpoint there: give a step folder or a run's folder")
    if newest is not None and int(newest.name[5:]) > read_state(found).step:
        raise CheckpointError(f"resume={resume}, but {own} holds {newest.name}, which is newer: name another output")
    return found


def set_aside(output: Path) -> None:
    """Move what an earlier run left in ``output`` to ``output/before-1`` (-2, ...), so that a new one starts clean."""
    left = [output / name for name in RUN_FILES if (output / name).exists()]
    if left:
        number = 1 + max((int(p.name[7:]) for p in output.glob("before-*") if p.name[7:].isdigit()), default=0)
        aside = output / f"before-{number}"
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)
        log.warning("resume=never: what %s held is now in %s", output, aside)


def read_state(checkpoint: Path) -> RunState:
    """The ``state.json`` of a step folder."""
    try:
        values = json.loads((checkpoint / STATE).read_text())
        return RunState(**{field.name: values[field.name] for field in fields(RunState)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / STATE} cannot be used ({type(error).__name__}: {error})") from error


def restore(engine: Any, recipe: Recipe, plan: RunPlan, digest: str, world: World) -> int:
    """Load what ``recipe.resume`` asks for into the engine; returns the optimizer steps done (0: afresh).

    Raises CheckpointError for a checkpoint of another model, world size, ZeRO stage, precision, batch or data, and
    for files that hold anything but tensors and plain values.
    """

    def choose() -> Path | None:
        output = Path(recipe.output)
        remove_leftovers(output / FOLDER)
        found = find(recipe.resume, output)
        if found is not None:
            _compare(found, read_state(found), RunState.at(0, recipe, plan, digest, engine.layout))
        return found

    found = on_main(choose, world)
    if found is None:
        return 0
    try:
        engine.load_checkpoint(str(found.parent), tag=found.name)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{found} holds more than tensors and plain values: not loaded. {error}") from error
    return read_state(found).step


def _compare(found: Path, then: RunState, now: RunState) -> None:
    remedies = {
        "world_size": f"start {then.world_size} ranks",
        "zero_stage": f"set zero_stage={then.zero_stage}",
        "precision": f"set precision={then.precision}",
        "global_batch": f"set global_batch={then.global_batch}",
        "index_digest": "use the shards it was trained on",
        "layout": "it is another model: set the method section as in its recipe.yaml",
    }
    for name, remedy in remedies.items():
        before, after = getattr(then, name), getattr(now, name)
        if before != after:
            raise CheckpointError(
                f"{found} has {name}={_short(before)}, this run {_short(after)}: {remedy}, or name another output"
            )


def _short(value: Any) -> str:
    """A digest's first digits; anything else in full."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
