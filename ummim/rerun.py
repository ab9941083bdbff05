"""Run a bad step again, alone: what ``bad_steps/step-N`` of a run holds, and nothing else, on one CPU in float32."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ummim.data import Batch
from ummim.data.batch import PARTS
from ummim.data.labelled import LabelledBatch
from ummim.downstream.recipe import ClassifyRecipe
from ummim.downstream.task import Classification, build_model, encoder_from_scratch
from ummim.engine.trainer import step_seed
from ummim.errors import RecipeError, UserError
from ummim.pretrain import Pretraining
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe
from ummim.run_config import RunConfig

WEIGHTS = "model.safetensors"
UNMIXED = "  images were mixed with each other for that; each sample's loss below is of its own image and label"
BATCH_NORM = "  a linear probe normalises by the micro-batches of all ranks together; here, by this one alone"


def is_bundle(folder: Path) -> bool:
    """Is ``folder`` what a run leaves of a bad step."""
    return (folder / WEIGHTS).is_file() and any(folder.glob("rank-*-*.safetensors"))


def rerun(folder: Path) -> Iterator[str]:
    """Lines for the eye: of each micro-batch the loss then and now and the gradient's norm; of each sample the loss.

    The loss now is float32's, with the weights that the step met, and the drop-path that the step drew where it ran on
    a CPU: of such a run in float32 it is the same to the bit. Finite now and not then: it was the precision.

    Raises:
        UserError: files that are missing or do not fit each other.
    """
    recipe, task = _load(folder)
    broken = [name for name, value in task.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        yield f"the weights are not finite before the step: {', '.join(broken[:5])}: an earlier step has spoilt them"
    for path in sorted(folder.glob("rank-*-*.safetensors")):
        batch, told = _read(path, recipe)
        samples = list(_samples(task.eval(), batch))  # before the gradient: a linear probe's statistics move with it
        torch.manual_seed(step_seed(recipe.seed, told["step"] - 1, told["rank"], told["micro_batch"]))
        loss, norm = _gradient(task.train(), batch)
        then = f"loss {float(told['loss']):.6g} then, in {recipe.precision}"
        same = " (the same to the bit)" if loss == float(told["loss"]) else ""
        now = f"{loss:.6g} now, in fp32{same}; gradient norm {norm:.6g}"
        yield f"step {told['step']}, rank {told['rank']}, micro-batch {told['micro_batch']}: {then}; {now}"
        if isinstance(recipe, ClassifyRecipe):
            yield from [UNMIXED] * recipe.classify.mixes + [BATCH_NORM] * (recipe.classify.protocol == "linear")
        yield from samples


def _load(folder: Path) -> tuple[Recipe | ClassifyRecipe, Pretraining | Classification]:
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder / 'recipe.yaml'} is missing: give a step-N of a run's bad_steps")
    recipe: Any = load_recipe(str(folder / "recipe.yaml"), (), RunConfig)
    task: Pretraining | Classification
    if isinstance(recipe, Recipe):
        method = recipe.method.for_inference().build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)
        task = Pretraining(method)
    else:
        if recipe.classify.encoder is None:
            raise RecipeError(f"{folder / 'recipe.yaml'}: classify.encoder is missing: take the run's own recipe.yaml")
        task = Classification(build_model(recipe, encoder_from_scratch(recipe)), recipe.classify)
    try:
        task.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be used: {' '.join(str(error).split())}") from None
    return recipe, task


def _read(path: Path, recipe: RunConfig) -> tuple[Batch | LabelledBatch, dict[str, Any]]:
    kind: type[Batch] | type[LabelledBatch] = LabelledBatch if isinstance(recipe, ClassifyRecipe) else Batch
    try:
        return kind.load(path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None


def _gradient(task: nn.Module, batch: Batch | LabelledBatch) -> tuple[float, float]:
    """Loss of a micro-batch and the norm of its gradient."""
    task.zero_grad()
    loss: Tensor = task(batch).loss
    loss.backward()
    return loss.item(), float(nn.utils.get_total_norm(p.grad for p in task.parameters() if p.grad is not None))


@torch.no_grad()
def _samples(task: Any, batch: Batch | LabelledBatch) -> Iterator[str]:
    losses = [_alone(task, batch, i) for i in range(len(batch.keys))]
    width = max(len(key) for key in batch.keys)
    labelled = isinstance(batch, LabelledBatch)
    yield f"  {'sample':<{width}}  {'loss':>10}  {'label  ' * labelled}pixels: mean, deviation"
    order = sorted(range(len(losses)), key=lambda i: (losses[i] == losses[i], -losses[i]))  # not a number first
    for i in order:
        pixels = batch.images[i].float()
        label = f"{batch.labels[i]:>5}  " * labelled
        yield f"  {batch.keys[i]:<{width}}  {losses[i]:>10.6g}  {label}{pixels.mean():.1f}, {pixels.std():.1f}"


def _alone(task: Any, batch: Batch | LabelledBatch, i: int) -> float:
    """The loss of one sample; a labelled one is not mixed."""
    one = slice(i, i + 1)
    if isinstance(batch, LabelledBatch):
        smoothing = task.config.label_smoothing
        return F.cross_entropy(task.logits(batch.images[one]), batch.labels[one], label_smoothing=smoothing).item()
    parts: dict[str, Any] = {part: getattr(batch.plan, part)[one] for part in PARTS}
    return float(task(replace(batch, images=batch.images[one], plan=replace(batch.plan, **parts))).loss.item())
