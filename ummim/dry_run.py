"""``train.py RECIPE --dry-run``: resolve everything, check data and fit, print it, train nothing."""

from pathlib import Path

import torch
from torch import nn

from ummim.capacity import GIB, zero_state_bytes
from ummim.data import ShardIndex
from ummim.engine.zero import deepspeed_config
from ummim.methods.api import Method
from ummim.recipe import Recipe
from ummim.run_plan import RunPlan


def dry_run(recipe: Recipe, world_size: int) -> str:
    """A report of what the recipe would do on ``world_size`` ranks.

    The model is built without memory, and shards that are not at hand are planned for by the recipe's
    ``expected_samples``, so this runs on a laptop for any recipe.

    Raises:
        RecipeError: batch arithmetic that does not work out.
        DataError: shards that are at hand but unsound.
    """
    samples, data = _data(recipe)
    plan = recipe.plan(world_size, samples)
    deepspeed_config(recipe, plan)  # refuses a number that stands in both places
    with torch.device("meta"):
        method = recipe.method.build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)
    rows = [
        ("recipe", f"{recipe.name}: {recipe.description}"),
        ("output", recipe.output),
        ("data", data),
        *_model_rows(recipe, method),
        *_schedule_rows(recipe, plan),
        *_memory_rows(recipe, sum(p.numel() for p in method.parameters()), world_size),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _data(recipe: Recipe) -> tuple[int, str]:
    if not Path(recipe.data.shards).is_dir():
        return (
            recipe.expected_samples,
            f"{recipe.data.shards}: not at hand; planned for {recipe.expected_samples:,} images",
        )
    index = ShardIndex.open(recipe.data.shards)
    index.check()
    return len(index), f"{recipe.data.shards}: {len(index):,} images, digest {index.digest[:12]}"


def _model_rows(recipe: Recipe, method: Method) -> list[tuple[str, str]]:
    def count(module: nn.Module) -> str:
        return f"{sum(p.numel() for p in module.parameters()):,}"

    sampler = recipe.sampler()
    h, w = sampler.grid
    tokens = (
        f"{h}x{w} grid of {h * w}: {sampler.visible_count} visible ({sampler.secondary_count} of them secondary), "
        f"{sampler.kept_count} kept, {sampler.thrown_count} thrown"
    )
    return [
        ("parameters", f"{count(method)} trained, {count(method.encoder)} of them in the encoder"),
        ("tokens", f"{tokens}; {recipe.mask.kind} mask"),
    ]


def _schedule_rows(recipe: Recipe, plan: RunPlan) -> list[tuple[str, str]]:
    batch = (
        f"{plan.global_batch} images = {plan.micro_batch} per rank x {plan.accumulation} accumulated "
        f"x {plan.world_size} ranks"
    )
    steps = f"{plan.stop_step:,} of {plan.total_steps:,} ({recipe.epochs} epochs of {plan.steps_per_epoch:,})"
    rate = (
        f"0 to {plan.lr:.3e} over {plan.warmup_steps:,} steps, then a cosine to {recipe.optim.min_lr:g} "
        f"(base {recipe.optim.base_lr:g} per {recipe.optim.reference_batch} images)"
    )
    optimizer = f"AdamW, betas {recipe.optim.betas}, weight decay {recipe.optim.weight_decay}"
    return [("batch", batch), ("steps", steps), ("learning rate", rate), ("optimizer", optimizer)]


def _memory_rows(recipe: Recipe, parameters: int, world_size: int) -> list[tuple[str, str]]:
    rows = [("precision", f"{recipe.precision}, activation checkpointing: {recipe.activation_checkpointing}")]
    for stage in range(4):
        state = zero_state_bytes(parameters, stage, recipe.precision, world_size)
        mine = "   <- this recipe" if stage == recipe.zero_stage else ""
        text = (
            f"{state.total / GIB:.2f} GiB of states per rank (weights {state.parameters / GIB:.2f}, gradients "
            f"{state.gradients / GIB:.2f}, optimizer {state.optimizer / GIB:.2f}), without activations{mine}"
        )
        rows.append((f"ZeRO-{stage}", text))
    return rows
