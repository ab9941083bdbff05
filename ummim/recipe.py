"""A recipe of a pre-training run, typed and frozen. Each field is documented here or, where evaluations have it too,
in run_config.py, once. Reading YAML is recipe_file.py's.
"""

from dataclasses import dataclass, field, replace
from math import gcd

from ummim.errors import RecipeError
from ummim.masking import MaskConfig, PlanSampler
from ummim.methods.api import MethodConfig
from ummim.nn.aggregation import BLOCKS, PartialConfig
from ummim.run_config import RunConfig, largest_divisor


@dataclass(frozen=True)
class MonitorConfig:
    """How good the encoder's features are while it trains: the accuracy of k nearest neighbours on a side set.

    Attributes:
        shards: labelled images that vote, as ``data.shards``; empty: no monitor. Make them small: some thousands.
        val_shards: labelled images, of the same classes, that are classified.
        every: epochs between measurements; the last epoch is always measured.
        neighbours: how many vote.
        temperature: of their votes, exp(cosine similarity / temperature).
    """

    shards: str = ""
    val_shards: str = ""
    every: int = 10
    neighbours: int = 20
    temperature: float = 0.07

    def check(self) -> None:
        """Raise RecipeError for the first key whose value cannot work."""
        for key, fits, remedy in (
            ("val_shards", bool(self.val_shards) == bool(self.shards), "goes with monitor.shards: name both, or none"),
            ("every", self.every >= 1, "must be at least 1"),
            ("neighbours", self.neighbours >= 1, "must be at least 1"),
            ("temperature", self.temperature > 0, "must be above 0"),
        ):
            if not fits:
                raise RecipeError(remedy, f"monitor.{key}")


@dataclass(frozen=True, kw_only=True)
class Recipe(RunConfig):
    """One pre-training run.

    Attributes:
        method: the method and its sizes; ``method.name`` is a file of ``ummim/methods`` or a dotted module.
        throw_ratio: PR-MIM's r: thrown tokens as a share of all tokens; 0 is full reconstruction.
        partial: how thrown tokens are reconstructed.
        mask: how tokens are masked.
        init: weights to start from, for continued pre-training: a run's folder, an exported file, a folder of
            transformers, a timm or an official file (docs/export.md). Not read where the run goes on from a checkpoint.
        init_family: of an official file, such as ``mae_vit``.
        monitor: k nearest neighbours on a side set, now and then.
        figure_every: epochs between reconstruction figures; 0 draws none.
        figure_images: images in a figure.
        finetune: the packaged evaluation with which the papers fine-tune this encoder, such as
            ``finetune_mae_vit_base_800e``; for ``ummim recipes`` and ``ummim rehearse``, training does not read it.
    """

    method: MethodConfig
    throw_ratio: float = 0.0
    partial: PartialConfig = field(default_factory=PartialConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    init: str = ""
    init_family: str | None = None
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    figure_every: int = 1
    figure_images: int = 8
    finetune: str = ""

    def check(self) -> None:
        """Refuse a recipe that cannot run, before anything starts.

        Raises:
            RecipeError: with the key at fault, what is wrong and how to mend it.
        """
        super().check()
        if self.figure_images < 1:
            raise RecipeError("must be at least 1", key="figure_images")
        if self.figure_every < 0:
            raise RecipeError("must not be negative", key="figure_every")
        self.monitor.check()
        if self.init_family is not None and not self.init:
            raise RecipeError(
                "is the family of an official file: name the file as init, or leave it out", "init_family"
            )
        if self.compile and not self.method.static_shapes:
            raise RecipeError(
                "this method's shapes follow the mask, so each step would be compiled anew; set it to false", "compile"
            )
        if not 0 < self.mask.ratio < 1:
            raise RecipeError("is a share of the tokens: choose a value between 0 and 1, such as 0.75", "mask.ratio")
        if not 0 <= self.mask.secondary_ratio < 1:
            raise RecipeError("is a share of the visible tokens: choose a value in [0, 1)", "mask.secondary_ratio")
        if not 0 <= self.throw_ratio < self.mask.ratio:
            raise RecipeError(
                f"is a share of all tokens: choose a value from 0 to below mask.ratio = {self.mask.ratio}",
                "throw_ratio",
            )
        if self.partial.kernel_size < 3 or self.partial.kernel_size % 2 == 0:
            raise RecipeError("must be odd and at least 3, to see the neighbours: choose 7, say", "partial.kernel_size")
        if self.partial.fill == "residual" and self.partial.aggregation in BLOCKS:
            remedy = "choose thrown or all: that aggregation is a whole block, which adds its input itself"
            raise RecipeError(remedy, "partial.fill")
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
        if self.throw_ratio > 0 and not self.sampler().thrown_count:
            raise RecipeError(f"throws none of {grid[0] * grid[1]} tokens; choose a larger one, or 0", "throw_ratio")

    def sampler(self) -> PlanSampler:
        """The mask sampler of this run."""
        return PlanSampler(self.method.mask_grid(self.data.image_size), self.mask, self.throw_ratio)

    def micro_batch_of(self, per_rank: int) -> int:
        share = self.mask.shared_by if self.mask.shared_by > 1 else per_rank  # a micro-batch lies within one share
        return largest_divisor(gcd(per_rank, share), self.micro_batch)
