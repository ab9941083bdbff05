"""``train.py RECIPE --dry-run``: resolve everything, check data and fit, print it, train nothing."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ummim.capacity.states import state_bytes
from ummim.capacity.strategy import GIB, STAGES, Shapes, strategy_of
from ummim.data import ShardIndex
from ummim.data.faults import SourceDown
from ummim.data.urls import is_url, local_path
from ummim.downstream.dry_run import evaluation_rows, monitor_rows
from ummim.downstream.recipe import ClassifyRecipe
from ummim.engine.zero import deepspeed_config
from ummim.interop.load import load_init
from ummim.masking import AttentionSampler, MaskConfig
from ummim.methods.api import Method
from ummim.nn.aggregation import PartialConfig
from ummim.recipe import Recipe
from ummim.run_config import RunConfig
from ummim.run_plan import RunPlan


def dry_run(recipe: RunConfig, world_size: int) -> str:
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
    model: nn.Module | None
    if isinstance(recipe, Recipe):
        with torch.device("meta"):
            model = recipe.method.build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)
        own = [*_file_rows(recipe), *_init_rows(recipe, model), *_model_rows(recipe, model), *monitor_rows(recipe)]
    else:
        assert isinstance(recipe, ClassifyRecipe)
        own, model = evaluation_rows(recipe)
    rows = [
        ("recipe", f"{recipe.name}: {recipe.description}"),
        ("output", recipe.output),
        ("data", data),
        *own,
        *_schedule_rows(recipe, plan),
        *(() if model is None else _memory_rows(recipe, plan, model)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _data(recipe: RunConfig) -> tuple[int, str]:
    shards, data = recipe.data.shards, replace(recipe.data, retry_seconds=0)
    plan = f"planned for {recipe.expected_samples:,} images"
    if not is_url(shards) and not Path(local_path(shards)).is_dir():
        return recipe.expected_samples, f"{shards}: not at hand; {plan}"
    try:
        index = ShardIndex.open(shards, data.shard_cache())
        index.check()
    except SourceDown as error:
        return recipe.expected_samples, f"{error}; {plan}"
    return len(index), f"{index.place}: {len(index):,} images, digest {index.digest[:12]}"


def _file_rows(recipe: Recipe) -> list[tuple[str, str]]:
    return [
        ("file", f"{path}: {'at hand' if Path(path).is_file() else 'not at hand; training needs it'} ({key})")
        for key, path in recipe.method.files().items()
    ]


def _init_rows(recipe: Recipe, method: Method) -> list[tuple[str, str]]:
    """What the weights to start from would fill; the method is without memory, so names and shapes are checked."""
    if not recipe.init:
        return []
    return [("init", load_init(method, recipe.init, recipe.init_family).line())]


def _model_rows(recipe: Recipe, method: Method) -> list[tuple[str, str]]:
    def count(module: nn.Module) -> str:
        return f"{sum(p.numel() for p in module.parameters()):,}"

    sampler = recipe.sampler()
    h, w = sampler.grid
    tokens = (
        f"{h}x{w} grid of {h * w}: {sampler.visible_count} visible ({sampler.secondary_count} of them secondary), "
        f"{sampler.kept_count} kept, {sampler.thrown_count} thrown; {recipe.mask.kind} mask"
    )
    if recipe.mask.shared_by > 1:
        tokens += f", one for {recipe.mask.shared_by} images"
    rows = [
        ("parameters", f"{count(method)} trained, {count(method.encoder)} of them in the encoder"),
        ("tokens", tokens),
    ]
    if sampler.thrown_count:
        rows.append(("thrown", f"{_throwing(recipe.mask)}; {_filling(recipe.partial)}"))
    if recipe.method.attention is not None:
        later = AttentionSampler(sampler.grid, recipe.method.attention)
        rows.append(
            (
                f"epoch {recipe.method.attention.refresh_epochs} on",
                f"{later.visible_count} visible, {later.kept_count} kept, {later.thrown_count} thrown, by attention",
            )
        )
    return rows


def _throwing(mask: MaskConfig) -> str:
    what = "tokens" if mask.throw_unit == 1 else f"squares of {mask.throw_unit}x{mask.throw_unit} tokens"
    if mask.throwing == "random":
        return f"{what} at random"
    return f"{what}, by furthest sampling of those that are kept, ties: {mask.ties}"


def _filling(partial: PartialConfig) -> str:
    if partial.aggregation == "none":
        return "in no loss"
    size = "" if partial.aggregation == "transformer" else f" {partial.kernel_size}x{partial.kernel_size}"
    options = ["" if partial.bias or partial.aggregation != "conv" else ", without bias"]
    options.append("" if partial.fill == "thrown" else f", fill: {partial.fill}")
    options.append(", after the norm" if partial.after_norm else "")
    return f"filled in by {partial.aggregation}{size}{''.join(options)}"


def _schedule_rows(recipe: RunConfig, plan: RunPlan) -> list[tuple[str, str]]:
    batch = (
        f"{plan.global_batch} images = {plan.micro_batch} per rank x {plan.accumulation} accumulated "
        f"x {plan.world_size} ranks"
    )
    steps = f"{plan.stop_step:,} of {plan.total_steps:,} ({recipe.epochs} epochs of {plan.steps_per_epoch:,})"
    optim = recipe.optim
    start = optim.warmup_lr * plan.lr / optim.base_lr
    steps_down = f"times {optim.decay_rate:g} after epochs {', '.join(f'{epoch:g}' for epoch in optim.decay_epochs)}"
    after = f"a cosine to {optim.min_lr:g}" if optim.schedule == "cosine" else steps_down
    rate = (
        f"{start:.3g} to {plan.lr:.3e} over {plan.warmup_steps:,} steps, then {after} "
        f"(base {optim.base_lr:g} per {optim.reference_batch} images)"
    )
    clipping = f", gradients clipped to norm {optim.clip_grad:g}" if optim.clip_grad else ""
    own = f"LARS, momentum {optim.momentum}" if optim.optimizer == "lars" else f"AdamW, betas {optim.betas}"
    optimizer = f"{own}, weight decay {optim.weight_decay}{clipping}"
    return [("batch", batch), ("steps", steps), ("learning rate", rate), ("optimizer", optimizer)]


def _memory_rows(recipe: RunConfig, plan: RunPlan, model: nn.Module) -> list[tuple[str, str]]:
    shapes = Shapes.of(model)
    rows = [("precision", f"{recipe.precision}, activation checkpointing: {recipe.activation_checkpointing}")]
    for stage in STAGES:
        state = state_bytes(shapes, strategy_of(recipe, plan, stage), plan.world_size)
        mine = "   <- this recipe" if stage == recipe.zero_stage else ""
        text = (
            f"{state.total / GIB:.2f} GiB of states per rank (weights {state.weights / GIB:.2f}, gradients "
            f"{state.gradients / GIB:.2f}, optimizer {state.optimizer / GIB:.2f}, tables {state.buffers / GIB:.2f}), "
            f"without activations{mine}"
        )
        rows.append((f"ZeRO-{stage}", text))
    return rows
