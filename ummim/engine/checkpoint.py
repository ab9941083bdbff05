"""Checkpoints that are whole or absent: written aside, listed with checksums, renamed into place.

``checkpoints/step-N`` is a DeepSpeed tag (``checkpoints/latest`` names the newest, as DeepSpeed's own tools expect)
plus ``model.safetensors`` (all weights, float32), ``state.json`` and ``manifest.json``, the list of all of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from ummim.engine import zero
from ummim.engine.faults import on_main, raise_together
from ummim.errors import CheckpointError

if TYPE_CHECKING:
    from ummim.engine.zero import World
    from ummim.recipe import Recipe
    from ummim.run_plan import RunPlan

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class RunState:
    """Where a run stands, and what a run that goes on from there must share with it."""

    step: int
    epoch: float
    samples: int
    recipe: str
    world_size: int
    zero_stage: int
    precision: str
    global_batch: int
    seed: int
    index_digest: str
    layout: str

    @classmethod
    def at(cls, step: int, recipe: Recipe, plan: RunPlan, digest: str, layout: str) -> RunState:
        return cls(
            step=step,
            epoch=step / plan.steps_per_epoch,
            samples=step * plan.global_batch,
            recipe=recipe.name,
            world_size=plan.world_size,
            zero_stage=recipe.zero_stage,
            precision=recipe.precision,
            global_batch=plan.global_batch,
            seed=recipe.seed,
            index_digest=digest,
            layout=layout,
        )


def save(engine: Any, output: Path, state: RunState, keep: int, world: World) -> None:
    """Write ``output/checkpoints/step-N`` from every rank, then remove all but the newest ``keep`` (0: keep all).

    Raises CheckpointError on rank 0 (the others end with exit code 2) if any file could not be written, a full
    disk above all; the checkpoints before it are untouched and no half one is left.
    """
    folder = output / FOLDER
    temporary = folder / f".tmp-step-{state.step}"
    on_main(lambda: _prepare(temporary), world)
    files = engine.checkpoint_engine
    files.error, files.written = None, []
    engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
    weights = zero.full_state_dict(engine)
    reports: list[tuple[str | None, list[str]]] = [(None, [])] * world.size
    dist.all_gather_object(reports, (None if files.error is None else str(files.error), files.written))
    failure = next((error for error, _ in reports if error), None)
    unseen = [path for _, written in reports for path in written if world.is_main and not Path(path).exists()]
    if failure is None and unseen:
        failure = f"{unseen[0]} is not to be seen from rank 0: name an output on a file system that all hosts share"
    if world.is_main and failure is None:
        try:
            save_file(weights, temporary / WEIGHTS)
            _finish(temporary, folder / f"step-{state.step}", state)
            _retain(folder, keep)
        except (OSError, SafetensorError) as error:
            failure = str(error)
    outcome = [failure]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise_together(_unwritten(folder, state, outcome[0], world), world)


def _prepare(temporary: Path) -> None:
    try:
        remove_leftovers(temporary.parent)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{temporary.parent} cannot be written: {error.strerror}") from error


def _finish(temporary: Path, final: Path, state: RunState) -> None:
    (temporary / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n")
    shutil.copymode(temporary / STATE, temporary / WEIGHTS)  # safetensors makes its files private
    recipe = final.parents[1] / "recipe.yaml"
    if recipe.is_file():
        shutil.copyfile(recipe, temporary / recipe.name)
    seal(temporary)
    for path in (*_files(temporary), temporary / MANIFEST, temporary):
        _sync(path)
    if final.exists():  # found damaged at the start, or the same step trained again
        shutil.rmtree(final)
    temporary.rename(final)
    latest = final.parent / ".tmp-latest"
    latest.write_text(final.name)
    _sync(latest)
    latest.replace(final.parent / "latest")
    _sync(final.parent)


def seal(folder: Path) -> None:
    """Write the manifest of a step folder: the size and checksum of every file in it."""
    listing = {str(path.relative_to(folder)): _fingerprint(path) for path in _files(folder)}
    (folder / MANIFEST).write_text(json.dumps({"files": listing}, indent=2) + "\n")


def _unwritten(folder: Path, state: RunState, reason: str, world: World) -> CheckpointError:
    if world.is_main:
        remove_leftovers(folder)
    left = steps(folder)
    resume = f"the same command resumes from {left[0].name}" if left else "there is no earlier one"
    return CheckpointError(f"{folder}/step-{state.step} could not be saved: {_plainly(reason, folder)}; {resume}")


def _plainly(reason: str, folder: Path) -> str:
    free = shutil.disk_usage(folder).free
    if "No space left" in reason or "file write failed" in reason or free < 2**20:
        return f"disk full ({free / 2**20:.0f} MiB free now): free some space"
    return reason.splitlines()[0]


def _retain(folder: Path, keep: int) -> None:
    for old in steps(folder)[keep or None :]:
        doomed = folder / f".tmp-old-{old.name}"
        old.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted save or removal left behind."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def steps(folder: Path) -> list[Path]:
    """The step folders in ``folder``, newest first."""
    found = [p for p in folder.glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a step folder: a file missing, cut short or changed; None if it is whole."""
    try:
        listing = json.loads((checkpoint / MANIFEST).read_text())["files"]
        for name, expected in listing.items():
            path = checkpoint / name
            if not path.is_file():
                return f"missing {name}"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['size']}"
            if _fingerprint(path) != expected:
                return f"{name} has changed (sha256)"
    except FileNotFoundError:
        return f"missing {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be used ({type(error).__name__}: {error})"
    return None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
