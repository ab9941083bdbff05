"""What a pre-training does at the end of an epoch: a figure of reconstructions, and the monitor."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from ummim.data import ShardIndex, fixed_batch
from ummim.downstream.monitor import Monitor
from ummim.engine.data_faults import describe
from ummim.engine.faults import on_every_rank
from ummim.engine.trainer import Pause
from ummim.engine.watchdog import FIGURE
from ummim.engine.zero import World
from ummim.masking import PlanSampler
from ummim.methods.api import Method
from ummim.recipe import Recipe
from ummim.reconstruct import draw_reconstruction
from ummim.run_plan import RunPlan

log = logging.getLogger(__name__)


class EpochEnd:
    """See ``trainer.OnEpochEnd``; to be made and called on every rank.

    Raises:
        DataError: images for the figures that cannot be read, or the monitor's shards.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: RunPlan,
        method: Method,
        index: ShardIndex,
        sampler: PlanSampler,
        world: World,
        beat: Callable[[int, str], None],
    ) -> None:
        self.recipe, self.plan, self.method, self.world, self.beat = recipe, plan, method, world, beat
        fixed = on_every_rank(
            lambda: fixed_batch(index, recipe.data, sampler, recipe.seed, recipe.figure_images), world
        )
        for fault in (fault for fault in fixed.faults if world.is_main and fault.attempt == 0):
            log.warning("for the figures: %s; %r is shown instead", describe(fault), fault.replacement)
        self.fixed = fixed.to(world.device)
        self.monitor = (
            on_every_rank(lambda: Monitor(recipe, plan, world, beat), world) if recipe.monitor.shards else None
        )

    def __call__(self, pause: Pause) -> Mapping[str, float] | None:
        """Numbers for the step's line of metrics; None where it was interrupted."""
        epoch, left = divmod(pause.step, self.plan.steps_per_epoch)
        every = self.recipe.figure_every
        if every and (epoch % every == 0 or epoch == self.recipe.epochs) and not left and not pause.resumed:
            self.beat(pause.step, FIGURE)
            path = Path(self.recipe.output) / "reconstructions" / f"epoch-{epoch:04d}.png"
            title = f"{self.recipe.name}, epoch {epoch}"
            draw_reconstruction(self.method, self.fixed, path if self.world.is_main else None, title)
        return {} if self.monitor is None else self.monitor(pause)
