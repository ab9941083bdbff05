"""During pre-training, every few epochs: how many images of a side set do their nearest neighbours classify?

The encoder is copied for it, whole, in float32, and the copy thrown away; nothing that trains is touched or drawn
from, so that a run's weights are the same to the bit with a monitor and without.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ummim.data.config import DataConfig, LabelledDataConfig
from ummim.data.labelled import open_labelled
from ummim.data.shards import ShardIndex
from ummim.downstream.class_names import check_same_classes
from ummim.downstream.classify import Classifier, build_classifier
from ummim.downstream.evaluate import Parts, lacks_evaluation
from ummim.downstream.knn import classify
from ummim.downstream.recipe import ClassifyConfig
from ummim.engine.faults import on_main
from ummim.engine.trainer import Pause
from ummim.engine.watchdog import EVALUATE
from ummim.engine.zero import World
from ummim.engine.zero_state import full_state_dict
from ummim.interop.run import PREFIX
from ummim.recipe import Recipe
from ummim.run_plan import RunPlan

METRIC = "knn_top1"


def side_data(recipe: Recipe) -> LabelledDataConfig:
    """How images of the side sets are read: as the training's."""
    return LabelledDataConfig(**{f.name: getattr(recipe.data, f.name) for f in fields(DataConfig)})


def open_sides(recipe: Recipe, data: LabelledDataConfig) -> tuple[ShardIndex, ShardIndex]:
    """The set that votes and the one that is classified.

    Raises:
        DataError: missing, unsound, without labels or of different classes; their key is named.
    """
    known, asked = (
        open_labelled(data, getattr(recipe.monitor, key), None, f"monitor.{key}") for key in ("shards", "val_shards")
    )
    check_same_classes(known, asked, "monitor.val_shards")
    return known, asked


class Monitor:
    """See ``trainer.OnEpochEnd``; to be called on every rank, at every epoch's end.

    Args:
        recipe: of the pre-training, with a ``monitor`` that names shards.
        plan: its arithmetic.
        world: this process among all.
        beat: the watchdog's.

    Raises:
        DataError: see ``open_sides``.
    """

    def __init__(self, recipe: Recipe, plan: RunPlan, world: World, beat: Any) -> None:
        self.recipe, self.plan, self.world, self.beat = recipe, plan, world, beat
        self.data = side_data(recipe)
        self.known, self.asked = open_sides(recipe, self.data)
        labels = max(int(index.table["label"].max()) for index in (self.known, self.asked))
        config = recipe.monitor
        self.config = ClassifyConfig(
            protocol="knn", classes=labels + 1, neighbours=config.neighbours, temperature=config.temperature
        )

    def __call__(self, pause: Pause) -> Mapping[str, float] | None:
        """``knn_top1`` in percent where it is due, else nothing; None where it was interrupted."""
        epoch, left = divmod(pause.step, self.plan.steps_per_epoch)
        due = not left and (epoch % self.recipe.monitor.every == 0 or epoch == self.recipe.epochs)
        folder = Path(self.recipe.output)
        if not due or (pause.resumed and not on_main(lambda: lacks_evaluation(folder, pause.step, METRIC), self.world)):
            return {}
        step = 0 if pause.resumed else pause.step  # the watchdog gives what comes before the first step more time
        self.beat(step, EVALUATE)
        with torch.random.fork_rng():
            model = self._copy(pause.engine)
        known, asked = (
            Parts(index, self.data, self.recipe.micro_batch, self.world, lambda: pause.interrupts.code,
                  lambda: self.beat(step, EVALUATE))
            for index in (self.known, self.asked)
        )  # fmt: skip
        accuracy = classify(model, known, asked, self.config)
        return None if accuracy is None else {METRIC: accuracy.top1}

    def _copy(self, engine: Any) -> Classifier:
        """The encoder for whole images, with rank 0's copy of the master weights on every rank."""
        recipe, state = self.recipe, full_state_dict(engine)
        method: Any = recipe.method.for_inference().build(
            recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0
        )
        if self.world.is_main:
            method.load_state_dict({key.removeprefix(PREFIX): value for key, value in state.items()})
        model = build_classifier(method.backbone(), self.config.classes).to(self.world.device)
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
        return model
