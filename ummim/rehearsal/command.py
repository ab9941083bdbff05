"""``ummim rehearse RECIPE``: go through the stages, a line for each."""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from ummim.catalogue import fine_tuned, linked, record
from ummim.downstream.recipe import ClassifyRecipe
from ummim.environment import git_commit
from ummim.errors import UserError
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe
from ummim.rehearsal.processes import StageFailed, Start, entry_point, start
from ummim.rehearsal.shrink import shrink
from ummim.rehearsal.stages import Rehearsal
from ummim.run_config import RunConfig


def run(options: argparse.Namespace) -> int:
    """Rehearse what the options name; returns the exit code. Raises UserError."""
    rehearsal = prepare(options.recipe, options.overrides, options.finetune)
    passed = rehearse(rehearsal, options.keep)
    if passed == 0 and options.record:
        name = rehearsal.recipe.name
        print(f"{name}: rehearsed, written to {record(name, git_commit())}")
    return passed


def prepare(given: str, extra: list[str] | None = None, finetune: str | None = None, begin: Start = start) -> Rehearsal:
    """A rehearsal of a recipe, without a folder yet.

    Args:
        given: packaged name or path.
        extra: ``key=value``, applied before it is shrunk.
        finetune: the evaluation that follows a pre-training, instead of the linked one.
        begin: starts its processes.

    Raises:
        UserError: a recipe that cannot run, or no train.py here.
    """
    train = entry_point()
    recipe = load_recipe(given, extra or (), RunConfig)
    follows, kind = None, "vit"
    if isinstance(recipe, Recipe):
        name = finetune or linked(recipe)
        follows = (name, load_recipe(name, (), ClassifyRecipe)) if name else None
    elif finetune is not None:
        raise UserError(f"--finetune {finetune}: {given} is an evaluation itself; leave it out")
    else:
        assert isinstance(recipe, ClassifyRecipe)
        kind = encoder_kind(recipe)
    return Rehearsal(given, recipe, Path(), train, begin, follows, kind, tuple(extra or ()))


def rehearse(rehearsal: Rehearsal, keep: Path | None = None) -> int:
    """Go through the stages and print a line for each; returns the exit code.

    keep: an empty or new folder for all files; without it they are in a temporary one, which is removed where all went
    well. Raises UserError for a folder that holds files.
    """
    rehearsal.folder = _folder(keep).resolve()
    (rehearsal.folder / "logs").mkdir()
    shrunk = shrink(rehearsal.recipe, rehearsal.kind)
    print(f"{rehearsal.recipe.name}, rehearsed in {rehearsal.folder}\nkept: {shrunk.kept}\nshrunk: {shrunk.shrunk}")
    if isinstance(rehearsal.recipe, Recipe) and rehearsal.fine_tuning is None:
        print("no fine-tuning: no recipe is linked (`finetune:`); --finetune names one")
    begun = time.monotonic()
    for name, stage in rehearsal.stages():
        started = time.monotonic()
        try:
            told, code = stage(), 0
        except StageFailed as failure:
            told, code = str(failure), failure.code
        print(f"{name:12} {'ok' if code == 0 else 'FAILED':6} {time.monotonic() - started:6.1f} s  {told}", flush=True)
        if code:
            print(f"everything is left in {rehearsal.folder}")
            return code
    print(f"all stages passed in {time.monotonic() - begun:.0f} s")
    if keep is None:
        shutil.rmtree(rehearsal.folder)
    return 0


def _folder(keep: Path | None) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="ummim-rehearsal-"))
    keep.mkdir(parents=True, exist_ok=True)
    if any(keep.iterdir()):
        raise UserError(f"--keep {keep}: holds files; name a new folder or an empty one")
    return keep


def encoder_kind(recipe: ClassifyRecipe) -> str:
    """The kind of encoder that an evaluation is for: its own, that of a pre-training linked to it, or its family's."""
    config = recipe.classify
    if config.encoder is not None:
        return config.encoder.kind
    for pre_training in fine_tuned(recipe.name):
        method: Any = pre_training.method
        return str(method.encoder.kind)
    family = config.family or ""
    for end, kind in (("pvt", "pvt"), ("swin", "um_swin" if family.startswith("um_") else "swin")):
        if family.endswith(end):
            return kind
    return "relative_vit" if family == "simmim_vit" else "vit"
