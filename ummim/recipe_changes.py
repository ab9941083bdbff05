"""What of a recipe is another than in the checkpoint that a run goes on from: told, not refused."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ummim.recipe_file import flatten, to_dict
from ummim.run_config import RunConfig

log = logging.getLogger(__name__)

UNTOLD = ("output", "resume", "data.workers")  # which may differ for no reason that matters


def changes(recipe: RunConfig, step: int) -> list[str]:
    """``key: before, now after`` for every key, where the run goes on from ``step`` of its own folder or of the run or
    checkpoint that ``resume`` names; nothing where that holds no recipe.

    Batch, seed, data and shapes are refused by the checkpoint itself (``engine.resume``). What fits none the less, such
    as another mask, another way of throwing or another learning rate, may be meant or not.
    """
    named = Path(recipe.output if recipe.resume == "auto" else recipe.resume)
    places = [named / "checkpoints" / f"step-{step}" / "recipe.yaml", named / "recipe.yaml"]
    try:
        before = yaml.safe_load(next(place for place in places if place.is_file()).read_text())
    except (StopIteration, OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    if not isinstance(before, dict):
        return []
    then, now = (dict(flatten(values)) for values in (before, to_dict(recipe)))
    keys = [key for key in {**then, **now} if key not in UNTOLD and then.get(key) != now.get(key)]
    return [f"{key}: {_shown(then, key)}, now {_shown(now, key)}" for key in keys]


def tell_changes(recipe: RunConfig, step: int) -> None:
    """Log them; the run starts afresh at step 0."""
    for change in changes(recipe, step) if step else ():
        log.warning("goes on from step %d with another recipe: %s", step, change)


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return str(leaves[key]) if key in leaves else "unset"
