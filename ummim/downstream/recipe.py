"""A recipe of an evaluation: what a pre-trained encoder is worth as a classifier, typed and frozen.

Each field is documented here or, where pre-trainings have it too, in ummim/run_config.py, once.
"""

from dataclasses import dataclass
from typing import Literal

from ummim.backbones.pvt import PVTConfig
from ummim.backbones.relative_vit import RelativeViTConfig
from ummim.backbones.swin import SwinConfig
from ummim.backbones.table_swin import TableSwinConfig
from ummim.backbones.vit import ViTConfig
from ummim.data.config import LabelledDataConfig
from ummim.errors import RecipeError
from ummim.run_config import RunConfig

EncoderConfig = ViTConfig | RelativeViTConfig | SwinConfig | PVTConfig | TableSwinConfig


@dataclass(frozen=True)
class ClassifyConfig:
    """The ``classify`` section: which encoder, what is trained on it, and how.

    Attributes:
        weights: a run's folder or one of its checkpoints, an exported safetensors, or an official file. Empty: from
            scratch.
        family: of an official file, such as ``mae_vit``.
        encoder: the encoder's sizes, from scratch; with ``weights``, what they must be (usually left out). A run's
            own recipe.yaml holds them.
        protocol: what is trained. ``full``: everything. ``partial``: the last blocks, the norm and the head.
            ``linear``: a linear head on normalised features (MAE's linear probe). ``attentive``: one query that attends
            to the frozen tokens, and a head. ``knn``: nothing; the k nearest training images vote.
        last_blocks: blocks that ``partial`` trains.
        classes: number of classes; labels are 0 to classes - 1.
        pool: features are the ``mean`` of the patch tokens or the ``class`` token.
        norm_last: the norm of Microsoft's Swin stands behind the mean of the tokens, as that of other encoders does
            (LocalMIM); else before it.
        train_positions: train a fixed sine-cosine position table, too (MAE, UM-MAE; not TEC).
        norm_eps: eps of the norms of a ViT or of a Swin with position tables, from scratch; with weights, theirs is
            taken.
        drop_path: stochastic depth of the last block; it rises linearly from 0 at the first.
        layer_decay: each layer's learning rate is this many times that of the layer above; 1: all alike.
        label_smoothing: share of the target that is spread over all classes.
        mixup: alpha of mixup's beta distribution; 0: none.
        cutmix: alpha of CutMix's beta distribution; 0: none.
        mixup_prob: probability that a step mixes its images at all.
        mixup_switch: probability of CutMix where both are on.
        ema: decay of the moving average of the weights, per step, such as 0.9999; it is evaluated as well. 0: none.
        val_shards: folder of validation shards, or its URL, as ``data.shards``.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        neighbours: k of ``knn``.
        temperature: of the votes of ``knn``, exp(cosine similarity / temperature).
    """

    weights: str = ""
    family: str | None = None
    encoder: EncoderConfig | None = None
    protocol: Literal["full", "partial", "linear", "attentive", "knn"] = "full"
    last_blocks: int = 0
    classes: int = 1000
    pool: Literal["mean", "class"] = "mean"
    norm_last: bool = False
    train_positions: bool = True
    norm_eps: float | None = None
    drop_path: float = 0.0
    layer_decay: float = 1.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch: float = 0.5
    ema: float = 0.0
    val_shards: str = ""
    eval_every: int = 1
    neighbours: int = 20
    temperature: float = 0.07

    @property
    def mixes(self) -> bool:
        """Images of a batch are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def frozen(self) -> bool:
        """The encoder is not trained at all."""
        return self.protocol in ("linear", "attentive", "knn")

    def check(self) -> None:
        """Raise RecipeError for the first key whose value cannot work."""
        for key, fits, remedy in (
            ("weights", bool(self.weights) or self.encoder is not None, "name them, or an encoder from scratch"),
            ("classes", self.classes >= 1, "must be at least 1"),
            ("last_blocks", (self.last_blocks > 0) == (self.protocol == "partial"), "goes with protocol: partial, and "
             "only with it; choose at least 1 there"),
            ("drop_path", 0 <= self.drop_path < 1, "is a chance: choose a value in [0, 1), such as 0.1"),
            ("layer_decay", 0 < self.layer_decay <= 1, "must be above 0 and at most 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "is a share: choose a value in [0, 1), such as 0.1"),
            ("mixup", self.mixup >= 0, "must not be negative; 0 switches it off"),
            ("cutmix", self.cutmix >= 0, "must not be negative; 0 switches it off"),
            ("mixup_prob", 0 <= self.mixup_prob <= 1, "is a probability: choose a value between 0 and 1"),
            ("mixup_switch", 0 <= self.mixup_switch <= 1, "is a probability: choose a value between 0 and 1"),
            ("ema", 0 <= self.ema < 1, "is a decay: choose a value in [0, 1), such as 0.9999"),
            ("val_shards", bool(self.val_shards), "name the folder of the validation shards"),
            ("eval_every", self.eval_every >= 1, "must be at least 1"),
            ("neighbours", self.neighbours >= 1, "must be at least 1"),
            ("temperature", self.temperature > 0, "must be above 0"),
            ("drop_path", not (self.frozen and self.drop_path), "the encoder is frozen; set it to 0"),
            ("layer_decay", not (self.frozen and self.layer_decay != 1), "the encoder is frozen; set it to 1"),
        ):  # fmt: skip
            if not fits:
                raise RecipeError(remedy, f"classify.{key}")


@dataclass(frozen=True, kw_only=True)
class ClassifyRecipe(RunConfig):
    """One evaluation.

    Attributes:
        classify: which encoder, what is trained on it, and how.
        data: training shards, decoding and augmentation.
    """

    classify: ClassifyConfig
    data: LabelledDataConfig
    epochs: int = 100
    global_batch: int = 1024
    milestone_every: int = 0

    def check(self) -> None:
        super().check()
        self.classify.check()

    def micro_batch_of(self, per_rank: int) -> int:
        sizes = [m for m in range(1, min(self.micro_batch, per_rank) + 1) if per_rank % m == 0]
        if not self.classify.mixes:
            return max(sizes)
        pairs = [m for m in sizes if m % 2 == 0]
        if not pairs:
            raise RecipeError(
                f"global_batch = {self.global_batch}: mixup mixes pairs, and {per_rank} images on a rank at up to "
                f"micro_batch = {self.micro_batch} do not make pairs: choose even numbers, or set classify.mixup and "
                "classify.cutmix to 0"
            )
        return max(pairs)
