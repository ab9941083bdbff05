"""Where a run goes on from: the newest whole checkpoint, a named one, or a clean start."""

from __future__ import annotations

import fcntl
import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ummim.engine import zero_state
from ummim.engine.checkpoint import FOLDER, MANIFEST, STATE, RunState, fault, remove_leftovers, steps
from ummim.engine.checkpoint_shards import Contents
from ummim.engine.faults import on_every_rank, on_main
from ummim.errors import CheckpointError

if TYPE_CHECKING:
    from ummim.engine.zero import World
    from ummim.run_config import RunConfig
    from ummim.run_plan import RunPlan

log = logging.getLogger(__name__)

RUN_FILES = (
    FOLDER,
    "metrics.jsonl",
    "data_faults*.jsonl",
    "bad_steps*",
    "stacks-*.txt",
    "recipe.yaml",
    "environment.json",
    "evaluation.json",
    "reconstructions",
    "tensorboard",
)


_locks: list[IO[str]] = []  # held until the process ends


def lock(output: Path) -> None:
    """Make ``output`` and take it for this process. Raises CheckpointError if another run is in it."""
    output.mkdir(parents=True, exist_ok=True)
    file = (output / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by the loader's workers
    except (BlockingIOError, PermissionError):
        raise CheckpointError(f"{output}: another run is writing here: wait for it, or name another output") from None
    _locks.append(file)


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

    A path is a step folder, a run's folder, or its ``checkpoints``. Where the output has gone on from another run's
    path, its own newest is taken, so that the same command resumes; a path to an earlier step of the output itself
    goes back there. ``never``, and going back, set later files aside. Raises CheckpointError if nothing whole is there.
    """
    own = output / FOLDER
    newest = next(iter(steps(own)), None)
    if resume == "auto":
        return newest_valid(own)
    if resume == "never":
        set_aside(output, [path for name in RUN_FILES for path in sorted(output.glob(name))])
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
    if found.resolve().parent == own.resolve():
        set_aside(output, [later for later in steps(own) if int(later.name[5:]) > int(found.name[5:])])
    elif newest is not None and int(newest.name[5:]) > read_state(found).step:
        log.warning("resume=%s: %s has gone on from there", resume, output)
        return newest_valid(own)
    return found


def set_aside(output: Path, paths: list[Path]) -> None:
    """Move those of ``paths`` that exist to ``output/before-1`` (-2, ...): out of the way, and not lost."""
    left = [path for path in paths if path.exists()]
    if left:
        number = 1 + max((int(p.name[7:]) for p in output.glob("before-*") if p.name[7:].isdigit()), default=0)
        aside = output / f"before-{number}"
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)
        log.warning("%s: moved to %s", ", ".join(str(path) for path in left), aside)


def read_state(checkpoint: Path) -> RunState:
    """The ``state.json`` of a step folder. Raises CheckpointError where it is none of this version's."""
    if any(checkpoint.glob("*_states.pt")):
        raise CheckpointError(
            f"{checkpoint} is DeepSpeed's, as earlier versions saved it: finish its run with one of them, or name "
            "another output; `ummim export` and `reconstruct` still read it"
        )
    try:
        values = json.loads((checkpoint / STATE).read_text())
        return RunState(**{field.name: values[field.name] for field in fields(RunState)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / STATE} cannot be used ({type(error).__name__}: {error})") from error


def restore(engine: Any, recipe: RunConfig, plan: RunPlan, digest: str, world: World) -> RunState:
    """Load what ``recipe.resume`` asks for into the engine; returns where the run stands (at step 0: afresh).

    World size, ZeRO stage and precision need not be those that saved it. Raises CheckpointError for a checkpoint of
    another model, global batch, seed or data, and for files that cannot be read.
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
        return RunState.at(0, recipe, plan, digest, engine.layout)
    state = on_every_rank(lambda: read_state(found), world)
    contents = on_every_rank(lambda: Contents(found, state.step, state.layout), world)
    zero_state.restore(engine, contents, state.optimizer, state.step)
    saved_by = (state.world_size, state.zero_stage, state.precision)
    if world.is_main and saved_by != (plan.world_size, recipe.zero_stage, recipe.precision):
        log.warning("%s was saved at world size %d, zero_stage %d, precision %s", found, *saved_by)
    return state


def _compare(found: Path, then: RunState, now: RunState) -> None:
    remedies = {
        "global_batch": f"set global_batch={then.global_batch}",
        "seed": f"set seed={then.seed}",
        "index_digest": "use the shards it was trained on",
        "layout": "it is another model: set the recipe as in its recipe.yaml",
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
