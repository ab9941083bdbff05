"""Run a bad step again, alone: what ``bad_steps/step-N`` of a run holds, and nothing else, on one CPU in float32."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ummim.data import Batch
from ummim.data.batch import PARTS
from ummim.data.normalise import normalise
from ummim.engine.trainer import step_seed
from ummim.errors import UserError
from ummim.methods.api import Method
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe

WEIGHTS = "model.safetensors"


def is_bundle(folder: Path) -> bool:
    """Is ``folder`` what a run leaves of a bad step."""
    return (folder / WEIGHTS).is_file() and any(folder.glob("rank-*-*.safetensors"))


def rerun(folder: Path) -> Iterator[str]:
    """Lines for the eye: of each micro-batch the loss then and now and the gradient's norm; of each sample the loss.

    The loss now is float32's, with the weights that the step met. Finite now and not then: it was the precision.

    Raises:
        UserError: files that are missing or do not fit each other.
    """
    recipe, method = _load(folder)
    broken = [name for name, value in method.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        yield f"the weights are not finite before the step: {', '.join(broken[:5])}: an earlier step has spoilt them"
    for path in sorted(folder.glob("rank-*-*.safetensors")):
        try:
            batch, told = Batch.load(path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
        torch.manual_seed(step_seed(recipe.seed, told["step"] - 1, told["rank"]))
        loss, norm = _gradient(method.train(), batch)
        then = f"loss {float(told['loss']):.6g} then, in {recipe.precision}"
        now = f"{loss:.6g} now, in fp32; gradient norm {norm:.6g}"
        yield f"step {told['step']}, rank {told['rank']}, micro-batch {told['micro_batch']}: {then}; {now}"
        yield from _samples(method.eval(), batch)


def _load(folder: Path) -> tuple[Recipe, Method]:
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder / 'recipe.yaml'} is missing: give a step-N of a run's bad_steps")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    method = recipe.method.for_inference().build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)
    try:
        weights = load_file(folder / WEIGHTS)
        method.load_state_dict({name.removeprefix("method."): value.float() for name, value in weights.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be used: {' '.join(str(error).split())}") from None
    return recipe, method


def _gradient(method: Method, batch: Batch) -> tuple[float, float]:
    """Loss of a micro-batch and the norm of its gradient."""
    method.zero_grad()
    loss: Tensor = method(normalise(batch.images), batch.plan).loss
    loss.backward()
    return loss.item(), float(nn.utils.get_total_norm(p.grad for p in method.parameters() if p.grad is not None))


@torch.no_grad()
def _samples(method: Method, batch: Batch) -> Iterator[str]:
    losses = []
    for i in range(len(batch.keys)):
        parts: dict[str, Any] = {part: getattr(batch.plan, part)[i : i + 1] for part in PARTS}
        losses.append(method(normalise(batch.images[i : i + 1]), replace(batch.plan, **parts)).loss.item())
    width = max(len(key) for key in batch.keys)
    yield f"  {'sample':<{width}}  {'loss':>10}  pixels: mean, deviation"
    order = sorted(range(len(losses)), key=lambda i: (losses[i] == losses[i], -losses[i]))  # not a number first
    for i in order:
        pixels = batch.images[i].float()
        yield f"  {batch.keys[i]:<{width}}  {losses[i]:>10.6g}  {pixels.mean():.1f}, {pixels.std():.1f}"
