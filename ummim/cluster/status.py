"""``ummim status``: how far a run has come, by its newest whole checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ummim.engine.checkpoint import FOLDER, steps
from ummim.engine.resume import newest_valid, read_state
from ummim.errors import CheckpointError
from ummim.recipe_file import load_recipe
from ummim.run_config import RunConfig


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    Attributes:
        output: the run's folder.
        checkpoint: the newest whole one; None before the first.
        step: optimizer steps in it.
        stop_step: where the run ends; None before the first checkpoint.
    """

    output: Path
    checkpoint: Path | None
    step: int
    stop_step: int | None

    @property
    def ended(self) -> bool:
        return self.stop_step is not None and self.step >= self.stop_step

    def __str__(self) -> str:
        if self.checkpoint is None:
            return f"{self.output}: no checkpoint yet"
        word = "ended" if self.ended else "not ended: the same command goes on from there"
        return f"{self.output}: step {self.step} of {self.stop_step} in {self.checkpoint.name}, {word}"


def status(run: str, overrides: Sequence[str] = (), whole: bool = True) -> Status:
    """The state of a run, named by its folder or by the words that train.py takes: a recipe and ``key=value``.

    whole: read every file of the newest checkpoint to see that it is.

    Raises:
        CheckpointError: no such run, or none of its checkpoints is whole.
        RecipeError: no such recipe.
    """
    folder = Path(run)
    if folder.is_dir() and not overrides:
        if not (folder / "recipe.yaml").is_file():
            raise CheckpointError(f"{run}: is no run's folder: it has no recipe.yaml")
        recipe, output = load_recipe(str(folder / "recipe.yaml"), (), RunConfig), folder
    else:
        recipe = load_recipe(run, overrides, RunConfig)
        output = Path(recipe.output)
    checkpoint = newest_valid(output / FOLDER) if whole else next(iter(steps(output / FOLDER)), None)
    if checkpoint is None:
        return Status(output, None, 0, None)
    state = read_state(checkpoint)
    return Status(output, checkpoint, state.step, stop_step(recipe, state.step, state.epoch))


def stop_step(recipe: RunConfig, step: int, epoch: float) -> int:
    """Where ``recipe`` ends, from a checkpoint at optimizer step ``step``, that is after ``epoch`` epochs."""
    steps_per_epoch = round(step / epoch)
    return recipe.plan(1, steps_per_epoch * recipe.global_batch).stop_step
