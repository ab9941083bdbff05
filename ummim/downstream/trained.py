"""Load what a fine-tuning or a probe left behind: its recipe and its model with a checkpoint's weights."""

from pathlib import Path

from ummim.downstream.classify import Classifier
from ummim.downstream.probe import Probe
from ummim.downstream.recipe import ClassifyRecipe
from ummim.downstream.task import build_model, encoder_from_scratch
from ummim.interop.run import RECIPE_FILE, fill, find_checkpoint, recipe_of
from ummim.recipe_file import load_recipe
from ummim.run_config import RunConfig

PREFIX = "model."  # the engine saves the task, which holds the model


def is_evaluation(path: Path) -> bool:
    """Whether a run's folder or checkpoint is a fine-tuning's or a probe's.

    Raises:
        CheckpointError: there is no checkpoint.
        RecipeError: its recipe cannot be read.
    """
    recipe_file = find_checkpoint(path) / RECIPE_FILE
    return recipe_file.is_file() and isinstance(load_recipe(str(recipe_file), (), RunConfig), ClassifyRecipe)


def load_trained(path: Path) -> tuple[ClassifyRecipe, Classifier | Probe, Path]:
    """The recipe, the model in eval mode on the CPU in float32, and the checkpoint folder it came from.

    Args:
        path: a run's folder (its newest checkpoint is taken) or one of its ``checkpoints/step-N``.

    Raises:
        CheckpointError: nothing there, or weights that do not fit the recipe.
        RecipeError: the run is a pre-training.
    """
    checkpoint = find_checkpoint(path)
    recipe = load_recipe(recipe_of(checkpoint), (), ClassifyRecipe)
    model = build_model(recipe, encoder_from_scratch(recipe))
    fill(model, checkpoint, PREFIX)
    return recipe, model.eval(), checkpoint
