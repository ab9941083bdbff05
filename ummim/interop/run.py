"""Load what a run left behind: its recipe and the method with a checkpoint's weights. Needs no DeepSpeed."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ummim.errors import CheckpointError
from ummim.methods.api import Method
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe

WEIGHTS = "model.safetensors"
_PREFIX = "method."  # the engine saves the task, which holds the method


def load_run(path: str | Path) -> tuple[Recipe, Method, Path]:
    """The recipe, the method in eval mode on the CPU in float32, and the checkpoint folder it came from.

    Args:
        path: a run's folder (its newest checkpoint is taken) or one of its ``checkpoints/step-N``.

    Raises:
        CheckpointError: nothing there, or weights that do not fit the recipe.
    """
    checkpoint = _checkpoint(Path(path))
    run = checkpoint.parent.parent
    if not (run / "recipe.yaml").is_file():
        raise CheckpointError(f"{run}: no recipe.yaml beside the checkpoints; give the folder train.py wrote")
    recipe = load_recipe(str(run / "recipe.yaml"))
    method = recipe.method.build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)
    try:
        tensors = load_file(checkpoint / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint / WEIGHTS}: cannot be read ({error}); use another checkpoint") from None
    weights = {key.removeprefix(_PREFIX): tensor.float() for key, tensor in tensors.items()}
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint / WEIGHTS}: does not fit {run / 'recipe.yaml'}: {problem}") from None
    return recipe, method.eval(), checkpoint


def _checkpoint(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a run's folder or one of its checkpoints/step-N")
    if (path / WEIGHTS).is_file():
        return path.resolve()
    steps = {
        int(folder.name.removeprefix("step-")): folder
        for folder in (path / "checkpoints").glob("step-*")
        if folder.name.removeprefix("step-").isdecimal() and (folder / WEIGHTS).is_file()
    }
    if not steps:
        raise CheckpointError(f"{path}: holds no checkpoint with {WEIGHTS}; give a run's folder or a step-N folder")
    return steps[max(steps)].resolve()
