"""Load what a run of any kind left behind: its recipe and its model with a checkpoint's weights."""

from pathlib import Path

from ummim.downstream.classify import Classifier
from ummim.downstream.probe import Probe
from ummim.downstream.recipe import ClassifyRecipe
from ummim.downstream.task import build_model, encoder_from_scratch
from ummim.errors import CheckpointError
from ummim.interop.run import RECIPE_FILE, fill, find_checkpoint, method_of, recipe_of
from ummim.methods.api import Method
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe
from ummim.run_config import RunConfig

PREFIX = "model."  # the engine saves the task, which holds the model
NOT_TRAINED = "nearest neighbours train nothing and leave no checkpoint"


def load_any(path: Path) -> tuple[Recipe | ClassifyRecipe, Method | Classifier | Probe, Path]:
    """The recipe of any run, its model in eval mode on the CPU in float32, and the checkpoint folder it came from,
    whose files are verified once.

    Args:
        path: a run's folder (its newest checkpoint is taken) or one of its ``checkpoints/step-N``, of a pre-training, a
            fine-tuning or a probe.

    Raises:
        CheckpointError: nothing there, or weights that do not fit the recipe.
        RecipeError: its recipe cannot be read.
    """
    try:
        checkpoint = find_checkpoint(path)
    except CheckpointError:
        if weights := _of_neighbours(path):
            raise CheckpointError(f"{path}: {NOT_TRAINED}: give the weights that were evaluated, {weights}") from None
        raise
    recipe = load_recipe(recipe_of(checkpoint), (), RunConfig)
    if isinstance(recipe, ClassifyRecipe):
        return recipe, model_of(recipe, checkpoint), checkpoint
    assert isinstance(recipe, Recipe)
    return recipe, method_of(recipe, checkpoint), checkpoint


def _of_neighbours(path: Path) -> str:
    """The weights that were evaluated, if ``path`` is the folder of a k-NN evaluation; else nothing."""
    if (path / RECIPE_FILE).is_file():
        recipe = load_recipe(str(path / RECIPE_FILE), (), RunConfig)
        if isinstance(recipe, ClassifyRecipe) and recipe.classify.protocol == "knn":
            return recipe.classify.weights or "which were random"
    return ""


def load_trained(path: Path) -> tuple[ClassifyRecipe, Classifier | Probe, Path]:
    """Likewise, of a fine-tuning or a probe.

    Raises:
        CheckpointError: nothing there, or weights that do not fit the recipe.
        RecipeError: the run is a pre-training.
    """
    try:
        checkpoint = find_checkpoint(path)
    except CheckpointError:
        if _of_neighbours(path):
            again = f"for another set: train.py {path / RECIPE_FILE} classify.val_shards=FOLDER output=FOLDER"
            raise CheckpointError(f"{path}: {NOT_TRAINED}: their accuracy is in evaluation.json; {again}") from None
        raise
    recipe = load_recipe(recipe_of(checkpoint), (), ClassifyRecipe)
    return recipe, model_of(recipe, checkpoint), checkpoint


def model_of(recipe: ClassifyRecipe, checkpoint: Path) -> Classifier | Probe:
    """A fine-tuning's or a probe's model with the weights of a step folder, in eval mode on the CPU in float32.

    Raises:
        CheckpointError: weights that do not fit the recipe.
    """
    model = build_model(recipe, encoder_from_scratch(recipe))
    fill(model, checkpoint, PREFIX)
    return model.eval()
