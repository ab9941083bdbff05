"""What ``--dry-run`` says about an evaluation, and about the monitor of a pre-training."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ummim.data.labelled import check_labels, open_labelled
from ummim.data.shards import ShardIndex
from ummim.data.urls import is_url, local_path
from ummim.downstream.class_names import check_same_classes
from ummim.downstream.classify import Classifier
from ummim.downstream.monitor import open_sides, side_data
from ummim.downstream.recipe import ClassifyRecipe
from ummim.downstream.run import saved_checkpoint, starting_encoder
from ummim.downstream.task import Classification, build_model, encoder_from_scratch, resolved
from ummim.recipe import Recipe

Rows = list[tuple[str, str]]


def evaluation_rows(recipe: ClassifyRecipe) -> tuple[Rows, nn.Module | None]:
    """Rows for the report, and the task; None where the weights are not at hand and the recipe has no sizes, or where
    nothing is trained.

    Raises:
        UserError: weights or shards that are at hand but do not fit.
    """
    config, data, saved = recipe.classify, recipe.data, saved_checkpoint(recipe)
    here = saved is not None or (bool(config.weights) and Path(config.weights).exists())
    rows = [("validation", _validation(recipe))]
    if config.weights:
        how = "at hand" if here else "not at hand; training needs them"
        how = how if saved is None else f"not needed: the run goes on from {saved}"
        rows.append(("weights", f"{config.weights}: {how}"))
    views = [data.randaugment or (f"colour jitter {data.color_jitter:g}" if data.color_jitter else "")]
    views += [f"{name} {value:g}" for name, value in (
        ("erasing", data.erasing), ("mixup", config.mixup), ("cutmix", config.cutmix),
        ("label smoothing", config.label_smoothing)) if value]  # fmt: skip
    rows.append(("augmentation", ", ".join(["crops, flips", *filter(None, views)])))
    rows.append(
        ("evaluation", f"short side {data.eval_side}, centre {data.image_size}, every {config.eval_every} epochs")
    )
    if not here and config.encoder is None:
        return [*rows, ("parameters", "unknown: name classify.encoder to plan without the weights")], None
    if here:
        encoder, _ = starting_encoder(recipe)
        recipe = resolved(recipe, encoder)
    with torch.device("meta"):
        model = build_model(recipe, encoder_from_scratch(recipe))
        task = Classification(model, config)
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    count = sum(p.numel() for p in task.parameters())
    if config.protocol == "knn":
        return [*rows, ("parameters", f"{count:,}, none trained")], None
    what = f"{config.protocol}, {trained:,} trained of {count:,}"
    if isinstance(model, Classifier) and config.layer_decay != 1:
        scales = [group["lr_scale"] for group in task.parameter_groups(0.0)]
        what += f"; rates times {scales[0]:.3g} (embedding) to 1 (head)"
    return [*rows, ("parameters", what)], task


def monitor_rows(recipe: Recipe) -> Rows:
    """What is said of a pre-training's monitor, its sets being opened and checked where both are at hand.

    Raises:
        DataError: see ``open_sides``.
    """
    config = recipe.monitor
    if not config.shards:
        return []
    if far := [place for place in (config.shards, config.val_shards) if not _at_hand(place)]:
        return [("monitor", f"{far[0]}: not at hand; training needs it")]
    known, asked = open_sides(recipe, replace(side_data(recipe), retry_seconds=0))
    nearest = f"{config.neighbours} nearest of {len(known):,} images classify {len(asked):,}"
    return [("monitor", f"{nearest}, every {config.every} epochs")]


def _validation(recipe: ClassifyRecipe) -> str:
    """What is said of the validation shards; the labels of both sets are checked, as far as these are at hand.

    Raises:
        DataError: as the run itself would, see ``open_sets``.
    """
    shards, classes, data = recipe.classify.val_shards, recipe.classify.classes, replace(recipe.data, retry_seconds=0)
    train = ShardIndex.open(data.shards, data.shard_cache()) if _at_hand(data.shards) else None
    if train is not None:
        check_labels(train, classes, "data.shards")
    if not _at_hand(shards):
        return f"{shards}: not at hand"
    index = open_labelled(data, shards, classes, "classify.val_shards")
    if train is not None:
        check_same_classes(train, index, "classify.val_shards")
    return f"{index.place}: {len(index):,} images, digest {index.digest[:12]}"


def _at_hand(shards: str) -> bool:
    return not is_url(shards) and Path(local_path(shards)).is_dir()
