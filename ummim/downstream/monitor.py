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

from ummim.data import ShardIndex
from ummim.data.config import DataConfig, LabelledDataConfig
from ummim.data.labelled import check_labels
from ummim.downstream.classify import Classifier, build_classifier
from ummim.downstream.evaluate import Parts, evaluating, lacks_evaluation
from ummim.downstream.knn import Features, compute, gathered, vote
from ummim.downstream.recipe import ClassifyConfig
from ummim.engine.faults import on_main
from ummim.engine.trainer import Pause
from ummim.engine.watchdog import EVALUATE
from ummim.engine.zero import World
from ummim.engine.zero_state import full_state_dict
from ummim.errors import DataError
from ummim.recipe import Recipe
from ummim.run_plan import RunPlan

METRIC = "knn_top1"


class Monitor:
    """See ``trainer.OnEpochEnd``; to be called on every rank, at every epoch's end.

    Args:
        recipe: of the pre-training, with a ``monitor`` that names shards.
        plan: its arithmetic.
        world: this process among all.
        beat: the watchdog's.

    Raises:
        DataError: side sets that are missing, unsound or without labels; their key is named.
    """

    def __init__(self, recipe: Recipe, plan: RunPlan, world: World, beat: Any) -> None:
        self.recipe, self.plan, self.world, self.beat = recipe, plan, world, beat
        size = recipe.data.image_size
        shared = {f.name: getattr(recipe.data, f.name) for f in fields(DataConfig)}
        self.data = LabelledDataConfig(**shared)
        self.known, self.asked = (self._open(key) for key in ("shards", "val_shards"))
        labels = max(int(index.table["label"].max()) for index in (self.known, self.asked))
        config = recipe.monitor
        self.config = ClassifyConfig(
            protocol="knn", classes=labels + 1, neighbours=config.neighbours, temperature=config.temperature
        )
        self.image_size = size

    def _open(self, key: str) -> ShardIndex:
        shards = getattr(self.recipe.monitor, key)
        try:
            index = ShardIndex.open(shards, self.data.shard_cache())
            index.check()
        except DataError as error:
            raise DataError(f"monitor.{key}: {error}") from None
        check_labels(index, int(index.table["label"].max()) + 1, f"monitor.{key}")
        return index

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
        found: list[Features] = []
        with evaluating(model):
            for index in (self.known, self.asked):
                parts = Parts(index, self.data, self.recipe.micro_batch, self.world, lambda: pause.interrupts.code,
                              lambda: self.beat(step, EVALUATE))  # fmt: skip
                features = compute(model, parts)
                if features is None:
                    return None
                found.append(features)
            asked = gathered(found[1], self.world)
            accuracy = vote(found[0], asked, self.config, self.world, lambda: pause.interrupts.code)
        return None if accuracy is None else {METRIC: accuracy.top1}

    def _copy(self, engine: Any) -> Classifier:
        """The encoder for whole images, with rank 0's copy of the master weights on every rank."""
        recipe, state = self.recipe, full_state_dict(engine)
        method: Any = recipe.method.for_inference().build(self.image_size, recipe.partial, recipe.throw_ratio > 0)
        if self.world.is_main:
            method.load_state_dict({key.removeprefix("method."): value for key, value in state.items()})
        model = build_classifier(method.backbone(), self.config.classes).to(self.world.device)
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
        return model
