"""A recipe: everything that defines a pre-training run, typed and frozen. Each field is documented here, once.

``Recipe.check`` refuses combinations that cannot run; ``Recipe.plan`` turns batch and learning rate into numbers
for a world size. Reading YAML is recipe_file.py's.
"""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from ummim.data.config import DataConfig
from ummim.engine.bad_steps import BadStepConfig
from ummim.engine.optim import OptimConfig
from ummim.errors import RecipeError
from ummim.masking import MaskConfig, PlanSampler
from ummim.methods.api import MethodConfig
from ummim.nn.aggregation import PartialConfig
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


@dataclass(frozen=True)
class Recipe:
    """One pre-training run.

    Attributes:
        method: the method and its sizes; ``method.name`` is a file of ``ummim/methods`` or a dotted module.
        data: shards, decoding and augmentation.
        name: the run's name; the recipe file's stem unless given.
        description: one line.
        published: what was published for it, if anything; left out where a key is overridden.
        output: the run's folder; ``runs/<name>`` unless given.
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
        compile: torch.compile the method, at ZeRO stages 0 to 2; the first step then takes minutes.
        ds_config: a DeepSpeed JSON to use instead of ``ds_configs/zero<stage>.json``.
        throw_ratio: PR-MIM's r: thrown tokens as a share of all tokens; 0 is full reconstruction.
        partial: how thrown tokens are reconstructed.
        mask: how tokens are masked.
        optim: optimizer and schedule.
        bad_steps: what becomes of optimizer steps whose loss or gradient cannot be used.
        log_every: optimizer steps between lines of metrics.
        checkpoint_every: optimizer steps between checkpoints; one is always written at the end.
        checkpoint_async: write checkpoints while training goes on, from a copy of the state in host memory.
        keep_checkpoints: how many of the newest checkpoints stay; 0 keeps all.
        hang_seconds: how long a rank may spend in one phase of a step, such as its forward pass, before it counts as
            hung and the run ends; longer where a phase takes long on the average. 0 switches the watchdog off.
        milestone_every: epochs between checkpoints that always stay, with all weights in one file; 0: none.
        figure_every: epochs between reconstruction figures; 0 draws none.
        figure_images: images in a figure.
        tensorboard: write TensorBoard events.
        wandb: Weights & Biases project to log to, if any.
        resume: ``auto`` goes on from the newest valid checkpoint of ``output``, ``never`` starts anew, a path
            goes on from that checkpoint.
    """

    method: MethodConfig
    data: DataConfig
    name: str = ""
    description: str = ""
    published: Published = Published()  # noqa: B008 (frozen)
    output: str = ""
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
    throw_ratio: float = 0.0
    partial: PartialConfig = field(default_factory=PartialConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    bad_steps: BadStepConfig = field(default_factory=BadStepConfig)
    log_every: int = 20
    checkpoint_every: int = 1000
    checkpoint_async: bool = True
    keep_checkpoints: int = 3
    milestone_every: int = 100
    hang_seconds: float = 40
    figure_every: int = 1
    figure_images: int = 8
    tensorboard: bool = True
    wandb: str | None = None
    resume: str = "auto"

    def check(self) -> None:
        """Refuse a recipe that cannot run, before anything starts.

        Raises:
            RecipeError: with the key at fault, what is wrong and how to mend it.
        """
        for key in ("epochs", "expected_samples", "global_batch", "micro_batch", "log_every", "checkpoint_every",
                    "figure_images"):  # fmt: skip
            if getattr(self, key) < 1:
                raise RecipeError("must be at least 1", key=key)
        if not 0 <= self.seed < 2**63:
            raise RecipeError("must be between 0 and 2**63 - 1", key="seed")
        if self.max_steps is not None and self.max_steps < 1:
            raise RecipeError("must be at least 1", key="max_steps")
        for key in ("figure_every", "keep_checkpoints", "milestone_every"):
            if getattr(self, key) < 0:
                raise RecipeError("must not be negative", key=key)
        if not (self.hang_seconds == 0 or 1 <= self.hang_seconds < float("inf")):
            raise RecipeError("must be at least 1, or 0 for no watchdog", "hang_seconds")
        if self.compile and self.zero_stage == 3:
            raise RecipeError(
                "ZeRO-3 gathers weights between the operations of a graph; use zero_stage 0 to 2", "compile"
            )
        if self.compile and not self.method.static_shapes:
            raise RecipeError(
                "this method's shapes follow the mask, so each step would be compiled anew; set it to false", "compile"
            )
        self._check_optim()
        for key, fits in (("budget", self.bad_steps.budget >= 0), ("margin", self.bad_steps.margin >= 0)):
            if not fits:
                raise RecipeError("must not be negative", key=f"bad_steps.{key}")
        if self.bad_steps.spike and self.bad_steps.spike <= 1:
            raise RecipeError("is a multiple of the recent mean: above 1, or 0 for none", "bad_steps.spike")
        self.data.validate()
        if not 0 < self.mask.ratio < 1:
            raise RecipeError("is a share of the tokens: choose a value between 0 and 1, such as 0.75", "mask.ratio")
        if not 0 <= self.mask.secondary_ratio < 1:
            raise RecipeError("is a share of the visible tokens: choose a value in [0, 1)", "mask.secondary_ratio")
        if not 0 <= self.throw_ratio < self.mask.ratio:
            raise RecipeError(
                f"is a share of all tokens and must stay below mask.ratio = {self.mask.ratio}; choose a smaller one",
                "throw_ratio",
            )
        if self.partial.kernel_size < 1 or self.partial.kernel_size % 2 == 0:
            raise RecipeError("must be odd, such as 7", "partial.kernel_size")
        if self.mask.shared_by < 1 or self.global_batch % self.mask.shared_by:
            least = max(1, min(self.mask.shared_by, self.global_batch))
            near = next(n for n in range(least, 0, -1) if self.global_batch % n == 0)
            raise RecipeError(f"must divide global_batch = {self.global_batch}; use {near}, say", "mask.shared_by")
        if self.mask.kind == "uniform" and self.mask.ratio != 0.75:
            raise RecipeError("a uniform mask keeps one token of four: set it to 0.75", "mask.ratio")
        self.method.check(self.data.image_size, self.mask, self.throw_ratio)
        if self.method.attention is not None and self.data.crop != "resized":
            raise RecipeError("attention maps follow resized crops only; set it to resized", "data.crop")
        self._check_mask()

    def _check_mask(self) -> None:
        """Refuse a mask that the token grid cannot hold. Key after key joins in; the first to spoil it is at fault."""
        grid, mask = self.method.mask_grid(self.data.image_size), self.mask
        plain = MaskConfig(mask.kind, mask.ratio)
        units = replace(plain, unit=mask.unit)
        hidden = replace(units, secondary_ratio=mask.secondary_ratio)
        for key, config, throw_ratio, remedy in (
            ("mask.ratio", plain, 0.0, "choose a value further from 0 and 1, or a larger data.image_size"),
            ("mask.unit", units, 0.0, "choose a smaller one that divides both sides of the grid, such as 1"),
            ("mask.secondary_ratio", hidden, 0.0, "choose a smaller one"),
            ("mask.throw_unit", mask, 0.0, "choose a divisor of mask.unit"),
            ("throw_ratio", mask, self.throw_ratio, "choose a smaller one"),
        ):
            try:
                PlanSampler(grid, config, throw_ratio)
            except ValueError as error:
                if key == "mask.ratio" and mask.kind == "uniform":
                    key, remedy = "mask.kind", "choose another data.image_size, or random where the method can"
                raise RecipeError(f"{error}; {remedy}", key) from None

    def _check_optim(self) -> None:
        optim = self.optim
        for key, fits, remedy in (
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

    def sampler(self) -> PlanSampler:
        """The mask sampler of this run."""
        return PlanSampler(self.method.mask_grid(self.data.image_size), self.mask, self.throw_ratio)

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
        share = self.mask.shared_by if self.mask.shared_by > 1 else per_rank  # a micro-batch lies within one share
        micro = max(m for m in range(1, min(self.micro_batch, per_rank) + 1) if per_rank % m == 0 and share % m == 0)
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
