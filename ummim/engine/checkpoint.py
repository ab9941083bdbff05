"""Checkpoints as folders that are whole or absent: written aside, listed with checksums, renamed into place.

``checkpoints/step-N`` holds a file from each rank (``checkpoint_shards``), ``state.json``, the recipe, and
``manifest.json``, the list of all of it; at milestones and at the end of a run also all weights, float32, as
``model.safetensors``. ``checkpoints/latest`` names the newest. ``checkpoint_saver`` says who writes what, and when.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from ummim.engine.checkpoint_shards import Contents
from ummim.errors import CheckpointError

if TYPE_CHECKING:
    from ummim.run_config import RunConfig
    from ummim.run_plan import RunPlan

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
    milestone: bool
    """Never removed."""
    optimizer: dict[str, Any]
    """``zero_state.scalars``."""
    loss_mean: float
    loss_count: int
    """Those of ``bad_steps.LossMean``."""

    @classmethod
    def at(cls, step: int, recipe: RunConfig, plan: RunPlan, digest: str, layout: str) -> RunState:
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
            milestone=is_milestone(step, recipe, plan),
            optimizer={},
            loss_mean=0.0,
            loss_count=0,
        )


def is_milestone(step: int, recipe: RunConfig, plan: RunPlan) -> bool:
    """Whether the checkpoint after ``step`` optimizer steps is written in any case, with all weights, and stays."""
    return bool(recipe.milestone_every) and step % (recipe.milestone_every * plan.steps_per_epoch) == 0


def is_due(step: int, recipe: RunConfig, plan: RunPlan) -> bool:
    """Whether a checkpoint is written after ``step`` optimizer steps."""
    regular = bool(recipe.checkpoint_every) and step % recipe.checkpoint_every == 0
    return regular or is_milestone(step, recipe, plan) or step == plan.stop_step


def prepare(temporary: Path) -> None:
    """Make the folder that a checkpoint is written in. Raises CheckpointError if that cannot be."""
    try:
        remove_leftovers(temporary.parent)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{temporary.parent} cannot be written: {error.strerror}") from error


def write_rank_file(path: Path, tensors: dict[str, Tensor], told: dict[str, str]) -> dict[str, Any]:
    """Write a rank's file to the disk; returns its line in the manifest. Raises OSError and SafetensorError."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, told)
    _sync(path)
    return {path.name: _fingerprint(path)}


def finish(
    temporary: Path, final: Path, state: RunState, listing: dict[str, Any], weights: bool, keep: int
) -> dict[str, Any]:
    """Add the files of rank 0 and the manifest, put the folder in place, and remove what is too old."""
    for name, listed in listing.items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != listed["size"]:
            raise CheckpointError(
                f"{path} is not to be seen from rank 0: name an output on a file system that all hosts share"
            )
    (temporary / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n")
    recipe = final.parents[1] / "recipe.yaml"
    if recipe.is_file():
        shutil.copyfile(recipe, temporary / recipe.name)
    if weights:
        save_file(Contents(temporary, state.step, state.layout).weights(), temporary / WEIGHTS)
    for path in temporary.glob("*.safetensors"):  # safetensors makes its files private
        shutil.copymode(temporary / STATE, path)
    seal(temporary, listing)
    for path in (*_files(temporary), temporary / MANIFEST, temporary):
        if path.name not in listing:
            _sync(path)
    if final.exists():  # found damaged at the start, or the same step trained again
        final.rename(temporary.with_name(f".tmp-old-{final.name}"))
    temporary.rename(final)
    latest = final.parent / ".tmp-latest"
    latest.write_text(final.name)
    _sync(latest)
    latest.replace(final.parent / "latest")
    _sync(final.parent)
    _retain(final.parent, keep)
    return {}


def seal(folder: Path, known: dict[str, Any] | None = None) -> None:
    """Write the manifest of a step folder: the size and checksum of every file in it, but for ``known`` ones."""
    names = [str(path.relative_to(folder)) for path in _files(folder)]
    listing = {name: (known or {}).get(name) or _fingerprint(folder / name) for name in names}
    (folder / MANIFEST).write_text(json.dumps({"files": listing}, indent=2) + "\n")


def unwritten(folder: Path, state: RunState, reason: str) -> CheckpointError:
    """Remove what there is of a checkpoint that could not be written, and say why in words for the user."""
    remove_leftovers(folder)
    left = steps(folder)
    resume = f"the same command resumes from {left[0].name}, if that is whole" if left else "there is no earlier one"
    return CheckpointError(f"{folder}/step-{state.step} could not be saved: {_plainly(reason, folder)}; {resume}")


def _plainly(reason: str, folder: Path) -> str:
    free = shutil.disk_usage(folder).free
    if "No space left" in reason or "file write failed" in reason or free < 2**20:
        return f"disk full ({free / 2**20:.0f} MiB free now): free some space"
    return reason.splitlines()[0]


def _retain(folder: Path, keep: int) -> None:
    """Remove all step folders but the newest ``keep`` (0: keep all) and the milestones."""
    for old in steps(folder)[keep:] if keep else ():
        if not _stays(old):
            old.rename(folder / f".tmp-old-{old.name}")
    for doomed in folder.glob(".tmp-old-*"):
        shutil.rmtree(doomed)


def _stays(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / STATE).read_text())["milestone"])
    except (OSError, ValueError, KeyError, TypeError):  # damaged, or of an earlier version
        return False


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
