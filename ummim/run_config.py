"""What every run has in common, pre-training or evaluation, typed and frozen: all that the engine knows of a recipe.

``RunConfig.check`` refuses combinations that cannot run; ``RunConfig.plan`` turns batch and learning rate into
numbers for a world size. The recipes themselves are recipe.py's and downstream/recipe.py's.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from ummim.data.config import DataConfig
from ummim.engine.bad_steps import BadStepConfig
from ummim.engine.optim import OptimConfig
from ummim.errors import RecipeError
from ummim.run_plan import RunPlan


@dataclass(frozen=True)
class Published:
    """What was published for this very run; it does not pass on to recipes with this one as their ``base``.

    Attributes:
        top1: accuracy on ImageNet-1K after fine-tuning, in percent.
        source: who says so.
    """

    top1: float | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run.

    Attributes:
        name: the run's name; the recipe file's stem unless given.
        description: one line.
        published: what was published for it, if anything; left out where a key is overridden.
        output: the run's folder; ``runs/<name>`` unless given.
        data: shards, decoding and augmentation.
        seed: of weights, sample order, crops and masks.
        epochs: length of the schedule, in passes over the data.
        max_steps: stop after this many optimizer steps; the schedule keeps its length.
        expected_samples: images per epoch, for ``--dry-run`` where the shards are not at hand.
        global_batch: images per optimizer step, over all ranks and accumulation.
        micro_batch: most images a rank takes through the model at once; the largest divisor of a rank's share of
            the batch up to this is taken, and the rest is accumulated.
        zero_stage: DeepSpeed ZeRO stage.
        precision: of weights and activations in the model; bf16 and fp16 keep float32 master weights.
        reduce_precision: in which gradients are summed over the ranks. Without it, as ``precision``: in bf16 a sum over
            many ranks is rounded again and again, which fp32 avoids at twice the bytes.
        activation_checkpointing: recompute blocks in the backward pass, by PyTorch's, DeepSpeed's or fairscale's
            implementation (the last also with activations offloaded to the CPU).
        compile: torch.compile the model, at ZeRO stages 0 to 2; the first step then takes minutes.
        ds_config: a DeepSpeed JSON to use instead of ``ds_configs/zero<stage>.json``.
        optim: optimizer and schedule.
        bad_steps: what becomes of optimizer steps whose loss or gradient cannot be used.
        log_every: optimizer steps between lines of metrics.
        checkpoint_every: optimizer steps between checkpoints; one is always written at the end.
        checkpoint_async: write checkpoints while training goes on, from a copy of the state in host memory.
        keep_checkpoints: how many of the newest checkpoints stay; 0 keeps all.
        milestone_every: epochs between checkpoints that always stay, with all weights in one file; 0: none.
        hang_seconds: how long a rank may spend in one phase of a step, such as its forward pass, before it counts as
            hung and the run ends; longer where a phase takes long on the average. 0 switches the watchdog off.
        tensorboard: write TensorBoard events.
        wandb: Weights & Biases project to log to, if any.
        resume: ``auto`` goes on from the newest valid checkpoint of ``output``, ``never`` starts anew, a path
            goes on from that checkpoint.
    """

    name: str = ""
    description: str = ""
    published: Published = Published()  # noqa: B008 (frozen)
    output: str = ""
    data: DataConfig
    seed: int = 0
    epochs: int = 800
    max_steps: int | None = None
    expected_samples: int = 1_281_167
    global_batch: int = 4096
    micro_batch: int = 64
    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    reduce_precision: Literal["bf16", "fp32"] | None = None
    activation_checkpointing: Literal["none", "torch", "deepspeed", "fairscale", "fairscale_offload"] = "none"
    compile: bool = False
    ds_config: str | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    bad_steps: BadStepConfig = field(default_factory=BadStepConfig)
    log_every: int = 20
    checkpoint_every: int = 1000
    checkpoint_async: bool = True
    keep_checkpoints: int = 3
    milestone_every: int = 100
    hang_seconds: float = 40
    tensorboard: bool = True
    wandb: str | None = None
    resume: str = "auto"

    def check(self) -> None:
        """Refuse a recipe that cannot run, before anything starts.

        Raises:
            RecipeError: with the key at fault, what is wrong and how to mend it.
        """
        for key in ("epochs", "expected_samples", "global_batch", "micro_batch", "log_every", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise RecipeError("must be at least 1", key=key)
        if not 0 <= self.seed < 2**63:
            raise RecipeError("must be between 0 and 2**63 - 1", key="seed")
        if self.max_steps is not None and self.max_steps < 1:
            raise RecipeError("must be at least 1", key="max_steps")
        for key in ("keep_checkpoints", "milestone_every"):
            if getattr(self, key) < 0:
                raise RecipeError("must not be negative", key=key)
        if not (self.hang_seconds == 0 or 1 <= self.hang_seconds < float("inf")):
            raise RecipeError("must be at least 1, or 0 for no watchdog", "hang_seconds")
        if self.compile and self.zero_stage == 3:
            raise RecipeError(
                "ZeRO-3 gathers weights between the operations of a graph; use zero_stage 0 to 2", "compile"
            )
        self._check_optim()
        for key, fits in (("budget", self.bad_steps.budget >= 0), ("margin", self.bad_steps.margin >= 0)):
            if not fits:
                raise RecipeError("must not be negative", key=f"bad_steps.{key}")
        if self.bad_steps.spike and self.bad_steps.spike <= 1:
            raise RecipeError("is a multiple of the recent mean: above 1, or 0 for none", "bad_steps.spike")
        self.data.validate()

    def _check_optim(self) -> None:
        optim = self.optim
        for key, fits, remedy in (
            (
                "optimizer",
                optim.optimizer == "adamw" or self.zero_stage == 0,
                "lars compares the norms of whole layers, which ZeRO cuts up: set zero_stage to 0",
            ),
            ("momentum", 0 <= optim.momentum < 1, "must be in [0, 1)"),
            ("base_lr", optim.base_lr > 0, "must be above 0"),
            ("reference_batch", optim.reference_batch >= 1, "must be at least 1"),
            ("betas", all(0 <= beta < 1 for beta in optim.betas), "each must be in [0, 1)"),
            ("eps", optim.eps > 0, "must be above 0"),
            ("weight_decay", optim.weight_decay >= 0, "must not be negative"),
            ("warmup_epochs", 0 <= optim.warmup_epochs <= self.epochs, f"must be between 0 and epochs = {self.epochs}"),
            ("warmup_lr", 0 <= optim.warmup_lr <= optim.base_lr, f"must be between 0 and base_lr = {optim.base_lr}"),
            ("min_lr", optim.min_lr >= 0, "must not be negative"),
            ("decay_rate", 0 < optim.decay_rate <= 1, "must be above 0 and at most 1"),
            (
                "decay_epochs",
                all(a < b for a, b in pairwise((0, *optim.decay_epochs))),
                "must ascend from above 0",
            ),
            (
                "decay_epochs",
                bool(optim.decay_epochs) == (optim.schedule == "step"),
                "goes with schedule: step, and only with it; name at least one epoch there, such as [700]",
            ),
            ("clip_grad", optim.clip_grad >= 0, "must not be negative; 0 switches clipping off"),
        ):
            if not fits:
                raise RecipeError(remedy, key=f"optim.{key}")

    def micro_batch_of(self, per_rank: int) -> int:
        """The images of a micro-batch, of a rank's share of the batch."""
        return largest_divisor(per_rank, self.micro_batch)

    def plan(self, world_size: int, samples: int) -> RunPlan:
        """Batch, steps and learning rate for ``world_size`` ranks and ``samples`` images.

        Raises:
            RecipeError: a batch that the ranks do not divide, or more than the data holds.
        """
        batch = self.global_batch
        if batch > samples:
            raise RecipeError(f"global_batch = {batch}: the data holds only {samples} images: use at most that many")
        if batch % world_size:
            low = max(batch // world_size, 1) * world_size
            raise RecipeError(
                f"global_batch = {batch}: {world_size} ranks do not divide it: use {low} or {low + world_size}"
            )
        per_rank = batch // world_size
        micro = self.micro_batch_of(per_rank)
        steps_per_epoch = samples // batch
        total = self.epochs * steps_per_epoch
        return RunPlan(
            world_size=world_size,
            global_batch=batch,
            micro_batch=micro,
            accumulation=per_rank // micro,
            steps_per_epoch=steps_per_epoch,
            total_steps=total,
            stop_step=total if self.max_steps is None else min(total, self.max_steps),
            warmup_steps=round(self.optim.warmup_epochs * steps_per_epoch),
            lr=self.optim.base_lr * batch / self.optim.reference_batch,
        )


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` up to ``limit``, which is at least 1."""
    return max(d for d in range(1, min(limit, number) + 1) if number % d == 0)
