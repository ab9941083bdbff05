"""``python train.py`` with an evaluation's recipe: train on labels, evaluate now and then, and tell in files."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ummim.atomic import write_text
from ummim.backbones.pvt import PVTConfig
from ummim.backbones.vit import ViTConfig
from ummim.data import ShardIndex
from ummim.data.labelled import LabelledBatch, build_labelled_loader, check_labels, open_labelled
from ummim.downstream.adapt import Encoder
from ummim.downstream.class_names import check_same_classes
from ummim.downstream.encoders import describe, load_encoder
from ummim.downstream.evaluate import Accuracy, Parts, evaluate, evaluating, lacks_evaluation, write_evaluation
from ummim.downstream.knn import nearest_neighbours
from ummim.downstream.recipe import ClassifyConfig, ClassifyRecipe
from ummim.downstream.task import Classification, build_model, encoder_from_scratch, resolved
from ummim.engine.checkpoint import FOLDER, steps
from ummim.engine.faults import on_every_rank, on_main
from ummim.engine.resume import lock
from ummim.engine.trainer import Pause, train
from ummim.engine.watchdog import EVALUATE
from ummim.engine.zero import World, deepspeed_config
from ummim.environment import write_environment
from ummim.errors import UserError
from ummim.interop.run import RECIPE_FILE, recipe_of
from ummim.recipe_changes import tell_changes
from ummim.recipe_file import dump_recipe, load_recipe
from ummim.run_plan import RunPlan

log = logging.getLogger(__name__)

Beat = Callable[[int, str], None]
WEIGHTS = "weights.json"  # where a run's encoder came from


class Sets(NamedTuple):
    """The opened shards."""

    train: ShardIndex
    val: ShardIndex


def open_sets(recipe: ClassifyRecipe) -> Sets:
    """Open and check both sets.

    Raises:
        DataError: shards that are missing or unsound, or labels that do not fit the recipe or each other.
    """
    train = ShardIndex.open(recipe.data.shards, recipe.data.shard_cache())
    train.check()
    check_labels(train, recipe.classify.classes, "data.shards")
    val = open_labelled(recipe.data, recipe.classify.val_shards, recipe.classify.classes, "classify.val_shards")
    check_same_classes(train, val, "classify.val_shards")
    return Sets(train, val)


def classify(recipe: ClassifyRecipe, world: World, beat: Beat) -> int:
    """Run ``recipe`` on this rank, to its end or an interruption; returns the exit code. Raises UserError."""

    def prepare() -> tuple[Sets, RunPlan]:
        sets = open_sets(recipe)
        plan = recipe.plan(world.size, len(sets.train))
        if recipe.classify.protocol != "knn":
            deepspeed_config(recipe, plan)
        lock(Path(recipe.output))
        return sets, plan

    sets, plan = on_main(prepare, world)
    torch.manual_seed(recipe.seed)  # the same weights on every rank
    encoder, provenance = on_every_rank(lambda: starting_encoder(recipe), world)
    recipe = on_every_rank(lambda: resolved(recipe, encoder), world)
    model = on_every_rank(lambda: build_model(recipe, encoder), world)
    announce = partial(_announce, recipe, sets, provenance, world)
    if recipe.classify.protocol == "knn":
        announce()
        return nearest_neighbours(recipe, model, sets, world, beat)
    task = on_every_rank(lambda: Classification(model, recipe.classify), world)
    if recipe.compile:
        task.model.compile(dynamic=False)

    def batches(done: int) -> Iterable[LabelledBatch]:
        if world.is_main:  # the run is ours from here on: a refused checkpoint has ended it before
            tell_changes(recipe, done)
        announce()
        loader = build_labelled_loader(sets.train, recipe.data, recipe.seed, plan, world.rank, world.size, done)
        loader.pin_memory = world.device.type == "cuda"
        return loader

    evaluations = Evaluations(recipe, plan, task, sets.val, world, beat)
    return train(task, recipe, plan, world, sets.train.digest, batches, evaluations, beat, recipe.classify.ema)


def saved_checkpoint(recipe: ClassifyRecipe) -> Path | None:
    """The newest checkpoint among those that ``recipe.resume`` chooses from; None: the run starts afresh."""
    if recipe.resume == "never":
        return None
    path = Path(recipe.output if recipe.resume == "auto" else recipe.resume)
    folder = path / FOLDER
    found = [path] if path.name.startswith("step-") else steps(folder if folder.is_dir() else path)
    return next((checkpoint for checkpoint in found if (checkpoint / RECIPE_FILE).is_file()), None)


def starting_encoder(recipe: ClassifyRecipe) -> tuple[Encoder, dict[str, Any]]:
    """The encoder that ``recipe`` starts from, for whole images, and where it comes from.

    That of a run that goes on has the checkpoint's sizes and is yet to be filled: its weights are not read again.

    Raises:
        UserError: weights that are missing or do not fit, or a checkpoint that is not an evaluation's.
    """
    config, checkpoint = recipe.classify, saved_checkpoint(recipe)
    if checkpoint is not None:
        saved = load_recipe(recipe_of(checkpoint), (), ClassifyRecipe).classify
        config = replace(config, encoder=saved.encoder, norm_eps=saved.norm_eps)
        return encoder_from_scratch(replace(recipe, classify=config)), _provenance(checkpoint.parents[1])
    if not config.weights:
        return encoder_from_scratch(recipe), {}
    try:
        return load_encoder(config.weights, config.family, recipe.data.image_size, **_stated_heads(config))
    except UserError as error:
        raise UserError(f"classify.weights: {error}") from None


def _stated_heads(config: ClassifyConfig) -> dict[str, Any]:
    """The heads that a recipe states of an official file, in which no tensor tells those of a ViT or PVT."""
    if config.family is None or not isinstance(config.encoder, ViTConfig | PVTConfig):
        return {}
    return {"num_heads": config.encoder.num_heads}


def _provenance(run: Path) -> dict[str, Any]:
    """What ``weights.json`` of a run says, if it can be read."""
    try:
        found: dict[str, Any] = json.loads((run / WEIGHTS).read_text())
    except (OSError, ValueError):
        return {}
    return found


def _announce(recipe: ClassifyRecipe, sets: Sets, provenance: Mapping[str, Any], world: World) -> None:
    if world.is_main:
        output, weights = Path(recipe.output), recipe.classify.weights
        if weights and provenance and provenance["source"] != str(Path(weights)):
            log.warning("classify.weights=%s is not read: the run goes on from a checkpoint", weights)
        log.warning("%s", describe(provenance) if provenance else "an encoder from scratch")
        write_text(output / "recipe.yaml", dump_recipe(recipe))
        write_text(output / WEIGHTS, json.dumps(provenance, indent=2) + "\n")
        write_environment(output, world.size, world.device, sets.train.digest)


class Evaluations:
    """What a run does at the end of an epoch, see ``trainer.OnEpochEnd``: every ``eval_every`` epochs, and at its end,
    the accuracy on the validation set of the weights and, if there is one, of their moving average."""

    def __init__(
        self, recipe: ClassifyRecipe, plan: RunPlan, task: Classification, val: ShardIndex, world: World, beat: Beat
    ) -> None:
        self.recipe, self.plan, self.task, self.val, self.world, self.beat = recipe, plan, task, val, world, beat
        self.output = Path(recipe.output)

    def __call__(self, pause: Pause) -> Mapping[str, float] | None:
        every = self.recipe.classify.eval_every * self.plan.steps_per_epoch
        if pause.step % every and pause.step != self.plan.stop_step:
            return {}
        if pause.resumed and not on_main(lambda: lacks_evaluation(self.output, pause.step), self.world):
            return {}
        found: dict[str, Accuracy] = {}
        with evaluating(self.task):
            weights = self.measure(pause)
            if weights is None:
                return None
            found["weights"] = weights
            if pause.engine.average is not None:
                with pause.engine.average.in_place():
                    average = self.measure(pause)
                if average is None:
                    return None
                found["average"] = average
        if self.world.is_main:
            told = {"recipe": self.recipe.name, "step": pause.step, "epoch": pause.step / self.plan.steps_per_epoch}
            told |= {"val_shards": self.recipe.classify.val_shards, "val_digest": self.val.digest}
            write_evaluation(self.output, told, found)
            for name, accuracy in found.items():
                log.warning("epoch %.4g, %s: %s", told["epoch"], name, accuracy)
        values = {f"val_{key}": getattr(weights, key) for key in ("top1", "top5", "loss")}
        if "average" in found:
            values |= {f"val_ema_{key}": getattr(found["average"], key) for key in ("top1", "top5", "loss")}
        return values

    def measure(self, pause: Pause) -> Accuracy | None:
        step = 0 if pause.resumed else pause.step  # the watchdog gives what comes before the first step more time
        parts = Parts(
            self.val, self.recipe.data, self.recipe.micro_batch, self.world, lambda: pause.interrupts.code,
            lambda: self.beat(step, EVALUATE),
        )  # fmt: skip
        return evaluate(self.task.logits, parts)
