"""Labels of two sets mean the same only where their classes' names do."""

from dataclasses import replace

from ummim.data.shards import ShardIndex
from ummim.data.urls import shown
from ummim.downstream.recipe import ClassifyRecipe
from ummim.errors import DataError

SAME = "build both from the same class folders"
BY_NAME = f"{SAME}, or count by names: ummim robustness RUN --val FOLDER"


def check_same_classes(known: ShardIndex, other: ShardIndex, what: str, remedy: str = SAME) -> None:
    """Raise ``DataError`` where both sets name their classes and ``other``, which ``what`` named, does so otherwise."""
    if known.classes is None or other.classes is None or known.classes == other.classes:
        return
    differ = sorted(set(known.classes) ^ set(other.classes))
    which = f"in one alone: {', '.join(differ[:5])}" if differ else "another order"
    than = f"{other.place} has other classes than {known.place} ({which})"
    raise DataError(f"{what}: {than}, so its labels would mean others: {remedy}")


def compare_with_run(recipe: ClassifyRecipe, index: ShardIndex, what: str) -> str:
    """Check that an opened set, which ``what`` named, has the classes of the run's training shards or, where these
    cannot be opened, of its validation shards.

    Returns nothing, or a line that says that neither could be opened.

    Raises:
        DataError: it has others.
    """
    places = {"data.shards": recipe.data.shards, "classify.val_shards": recipe.classify.val_shards}
    for shards in places.values():
        try:
            known = ShardIndex.open(shards, replace(recipe.data, shards=shards, retry_seconds=0).shard_cache())
        except (DataError, OSError):
            continue
        if known.classes is not None:
            check_same_classes(known, index, what, BY_NAME)
            return ""
    tried = " and ".join(f"{key}={shown(shards)}" for key, shards in places.items())
    return f"{what}: class names of {index.place} could not be compared with the run's: {tried} cannot be opened"
