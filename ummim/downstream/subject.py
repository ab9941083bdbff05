"""A trained classifier as ``ummim robustness`` takes it: of a fine-tuning's run, or of an official file."""

from pathlib import Path
from typing import Any

import torch

from ummim.data.config import LabelledDataConfig
from ummim.data.shards import ShardIndex
from ummim.downstream.adapt import image_size_of
from ummim.downstream.encoders import file_sha256
from ummim.downstream.evaluated import load_task
from ummim.downstream.imagenet_variants import imagenet_classes
from ummim.downstream.recipe import ClassifyRecipe
from ummim.downstream.robustness import Subject, read_classes_file
from ummim.errors import CheckpointError, DataError, UserError
from ummim.interop.classifier import CLASSIFIERS, fine_tuned_classes, load_official_classifier
from ummim.interop.official import read_checkpoint
from ummim.interop.told import refuse_guesses


def load_subject(
    weights: Path, family: str | None, classes_file: Path | None, average: bool = False
) -> tuple[Subject, dict[str, Any]]:
    """The classifier in eval mode on the GPU, if there is one, and where it comes from.

    Args:
        weights: a fine-tuning's folder or one of its checkpoints, or an official fine-tuned file.
        family: of an official file, a key of ``CLASSIFIERS``; else None.
        classes_file: names the classes in label order; else a run's data does, or they are ImageNet-1K's.
        average: a fine-tuning's moving average of the weights instead of the weights.

    Raises:
        UserError: nothing there, weights that do not fit, no average, or another number of classes than the model has.
    """
    model: Any
    if weights.is_dir():
        if family is not None:
            raise UserError(f"{weights}: --family {family} is for official files; a run's recipe says what it is")
        recipe, task, checkpoint = load_task(weights, average)
        model = task.model
        told = {"format": "run", "recipe": recipe.name, "checkpoint": checkpoint.name}
        told["weights"] = "average" if average else "trained"
        data, count = recipe.data, recipe.classify.classes
        classes = _classes_of(recipe) if classes_file is None else read_classes_file(classes_file)
    else:
        if average:
            raise UserError(f"{weights}: --ema is for a fine-tuning's run; an official file has no moving average")
        model, told = _official(weights, family)
        data, count = LabelledDataConfig("", image_size=image_size_of(model.encoder)), len(model.head.weight)
        classes = imagenet_classes() if classes_file is None else read_classes_file(classes_file)
    if len(classes) != count:
        named = "ImageNet-1K" if classes_file is None else classes_file
        raise UserError(f"{weights}: has {count} classes, {named} {len(classes)}; name them with --classes FILE")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = Subject(model.to(device).eval(), classes, data.image_size, data.eval_side)
    return subject, {"source": str(weights), **told, "classes": count, "image_size": data.image_size}


def _classes_of(recipe: ClassifyRecipe) -> list[str]:
    """The class names of a run's training shards; where these are out of reach, ImageNet-1K's."""
    try:
        classes = ShardIndex.open(recipe.data.shards, recipe.data.shard_cache()).classes
    except DataError:
        classes = None
    return classes or imagenet_classes()


def _official(path: Path, family: str | None) -> tuple[Any, dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; name a fine-tuning's run or an official fine-tuned file")
    if family not in CLASSIFIERS:
        said = "is missing" if family is None else f"{family} has no classifier"
        raise UserError(f"{path}: --family {said}; say of which the file is, one of {', '.join(CLASSIFIERS)}")
    try:
        tensors, _ = read_checkpoint(path)
        if (classes := fine_tuned_classes(family, tensors)) is None:
            raise UserError(f"{path}: has no head: is it a pre-training's? Fine-tune it first")
        model = load_official_classifier(family, tensors, classes)
        refuse_guesses(path, model.encoder, {})
    except ValueError as error:  # OfficialError
        raise CheckpointError(f"{path}: {error}") from None
    return model.float(), {"format": "official", "recipe": family, "sha256": file_sha256(path)}
