"""``ummim evaluate``: the accuracy of what a fine-tuning or a probe left behind."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ummim.data.labelled import open_labelled
from ummim.data.shards import ShardIndex
from ummim.downstream.class_names import compare_with_run
from ummim.downstream.evaluate import FILE, Accuracy, Parts, evaluate, evaluating, write_evaluation
from ummim.downstream.recipe import ClassifyRecipe
from ummim.downstream.task import Classification
from ummim.downstream.trained import PREFIX, load_trained
from ummim.engine.checkpoint_shards import AVERAGE, Contents
from ummim.engine.faults import EXIT_INTERRUPT, Interrupts, agreed_stop, on_every_rank, on_main
from ummim.engine.resume import read_state
from ummim.engine.zero import setup_distributed, shutdown
from ummim.errors import CheckpointError, say


def load_task(path: Path, average: bool) -> tuple[ClassifyRecipe, Classification, Path]:
    """``load_trained``'s recipe, its model as a task, and the checkpoint.

    average: with the moving average of the weights instead of the weights.

    Raises:
        UserError: see ``load_trained``; or there is no average.
    """
    recipe, model, checkpoint = load_trained(path)
    if average:
        state = read_state(checkpoint)
        contents = Contents(checkpoint, state.step, state.layout)
        if AVERAGE not in contents.kinds:
            raise CheckpointError(f"{checkpoint}: has no moving average: it was trained with classify.ema=0")
        weights = contents.weights(AVERAGE)
        model.load_state_dict({key.removeprefix(PREFIX): value for key, value in weights.items()})
    return recipe, Classification(model, recipe.classify), checkpoint


def evaluate_run(
    path: Path, shards: str | None, average: bool, batch: int | None, workers: int | None, as_json: bool
) -> int:
    """Evaluate a checkpoint on all ranks of this process group and print it; returns the exit code.

    On the run's own validation shards, the newest checkpoint's numbers are also written to ``evaluation.json``, unless
    training has left them there.
    """
    world = setup_distributed()
    recipe, task, checkpoint = on_every_rank(lambda: load_task(path, average), world)
    if workers is not None:
        recipe = replace(recipe, data=replace(recipe.data, workers=workers))
    place = shards or recipe.classify.val_shards
    what = "classify.val_shards" if shards is None else "--shards"
    index = on_main(lambda: _open(recipe, place, what), world)
    task.to(world.device)
    with Interrupts() as interrupts, evaluating(task):
        parts = Parts(index, recipe.data, batch or recipe.micro_batch, world, lambda: interrupts.code)
        found = evaluate(task.logits, parts)
        if found is None:
            interrupts.leave()
            return agreed_stop(interrupts.code, world) or EXIT_INTERRUPT
    if world.is_main:
        state = read_state(checkpoint)
        told = {"recipe": recipe.name, "step": state.step, "epoch": state.epoch, "val_shards": place}
        told |= {"val_digest": index.digest}
        if shards is None and not average and path.resolve() != checkpoint and _step(path / FILE) != state.step:
            write_evaluation(path, told, {"weights": found})
        _print({**told, "weights": "average" if average else "trained", "checkpoint": str(checkpoint)}, found, as_json)
    shutdown()
    return 0


def _open(recipe: ClassifyRecipe, place: str, what: str) -> ShardIndex:
    """The set to evaluate on, its classes being the run's as far as can be told. Raises DataError."""
    index = open_labelled(recipe.data, place, recipe.classify.classes, what)
    if untold := compare_with_run(recipe, index, what):
        say(untold)
    return index


def _step(evaluation: Path) -> int:
    try:
        return int(json.loads(evaluation.read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def _print(told: dict[str, Any], found: Accuracy, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**told, **found.plain()}, indent=2))
    else:
        print(f"{told['checkpoint']} on {told['val_shards']}: {found}")
    sys.stdout.flush()
