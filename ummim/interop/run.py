"""Load what a run left behind: its recipe and the method with a checkpoint's weights. Needs no DeepSpeed."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ummim.engine.checkpoint import FOLDER, WEIGHTS, fault
from ummim.engine.checkpoint_shards import Contents
from ummim.engine.resume import newest_valid, read_state
from ummim.errors import CheckpointError
from ummim.methods.api import Method
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe

RECIPE_FILE = "recipe.yaml"
PREFIX = "method."  # the engine saves the task, which holds the method


def load_run(path: str | Path) -> tuple[Recipe, Method, Path]:
    """The recipe, the method in eval mode on the CPU in float32, and the checkpoint folder it came from.

    Args:
        path: a run's folder (its newest checkpoint is taken) or one of its ``checkpoints/step-N``.

    Raises:
        CheckpointError: nothing there, or weights that do not fit the recipe.
        RecipeError: the run is no pre-training.
    """
    try:
        checkpoint = find_checkpoint(Path(path))
    except CheckpointError:
        if (own := Path(path) / RECIPE_FILE).is_file():
            load_recipe(str(own))  # which says so where checkpoints are not to be expected, as of nearest neighbours
        raise
    recipe = load_recipe(recipe_of(checkpoint))
    return recipe, method_of(recipe, checkpoint), checkpoint


def method_of(recipe: Recipe, checkpoint: Path) -> Method:
    """A pre-training's method with the weights of a step folder, in eval mode on the CPU in float32.

    Raises:
        CheckpointError: weights that do not fit the recipe.
    """
    method = recipe.method.for_inference().build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)
    fill(method, checkpoint, PREFIX)
    return method.eval()


def recipe_of(checkpoint: Path) -> str:
    """The recipe's file in a step folder. Raises CheckpointError where there is none."""
    recipe_file = checkpoint / RECIPE_FILE
    if not recipe_file.is_file():
        raise CheckpointError(f"{checkpoint}: has no {RECIPE_FILE}; give a folder that train.py wrote")
    return str(recipe_file)


def fill(model: nn.Module, checkpoint: Path, prefix: str) -> None:
    """Load a step folder's weights, in float32, into what the task holds as ``prefix``.

    Raises:
        CheckpointError: weights that do not fit.
    """
    weights = {key.removeprefix(prefix): tensor.float() for key, tensor in read_weights(checkpoint).items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint}: the weights do not fit {checkpoint / RECIPE_FILE}: {problem}") from None


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """All weights of a step folder: from its one file, if it is a milestone's, or from those of the ranks."""
    if not (checkpoint / WEIGHTS).is_file():
        state = read_state(checkpoint)
        return Contents(checkpoint, state.step, state.layout).weights()
    try:
        return load_file(checkpoint / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint / WEIGHTS}: cannot be read ({error}); use another checkpoint") from None


def find_checkpoint(path: Path) -> Path:
    """The step folder that ``path`` names, or the newest whole one of the run it names.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a run's folder or one of its checkpoints/step-N")
    if (path / FOLDER).is_dir():
        found = newest_valid(path / FOLDER)
        if found is None:
            raise CheckpointError(f"{path}: holds no checkpoint yet")
        return found.resolve()
    if wrong := fault(path):
        raise CheckpointError(f"{path}: {wrong}: give a run's folder or a whole checkpoints/step-N")
    return path.resolve()
