"""A recipe made small: what is changed, and what stays as it is.

The code path stays: method, kind of encoder, mask, partial reconstruction, ZeRO stage, precision, activation
checkpointing and schedule. Widths, depths, images, batch and lengths shrink.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from ummim.backbones.pvt import PVTConfig
from ummim.backbones.relative_vit import RelativeViTConfig
from ummim.backbones.swin import SwinConfig
from ummim.backbones.table_swin import TableSwinConfig
from ummim.backbones.vit import ViTConfig
from ummim.downstream.recipe import ClassifyRecipe
from ummim.recipe import Recipe
from ummim.recipe_file import flatten, to_dict
from ummim.run_config import RunConfig

CLASSES = 9  # of the packaged photographs
BATCH, SHARED = 8, 4  # images of a step; images with one mask, where masks are shared
STEPS, LONG, CHECKPOINT_EVERY = 12, 60, 4  # of a run; of one that will be killed before it ends; between checkpoints
STEPS_PER_EPOCH = 6
VITS = ("vit", "relative_vit")
SWIN_SIDE, VIT_PATCHES = 128, 6  # pixels; patches along a side of a ViT's image

# By kind: four stages stay four stages, the first with a block whose windows are shifted.
ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 64, "depth": 4, "num_heads": 2},
    "relative_vit": {"embed_dim": 64, "depth": 4, "num_heads": 2},
    "um_swin": {"embed_dim": 16, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 2, 4], "pos_mlp_dim": 8},
    "swin": {"embed_dim": 16, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 2, 4]},
    "pvt": {"embed_dims": [16, 24, 32, 48], "depths": [2, 1, 1, 1], "num_heads": [1, 2, 2, 4], "mlp_ratios": [2.0] * 4},
}
FRESH = {"vit": ViTConfig, "relative_vit": RelativeViTConfig, "um_swin": SwinConfig, "swin": TableSwinConfig,
         "pvt": PVTConfig}  # fmt: skip


@dataclass(frozen=True)
class Shrunk:
    """Changes of a recipe.

    Attributes:
        changes: dotted key -> the value it gets.
        before: dotted key -> the recipe's own value, of the keys in ``changes``.
        kept: what stays, in words.
    """

    changes: dict[str, Any]
    before: dict[str, Any]
    kept: str

    @property
    def shrunk(self) -> str:
        """What is not kept, in words."""
        changed = {key: value for key, value in self.changes.items() if self.before.get(key) != value}
        return ", ".join(f"{key} {_yaml(self.before.get(key))} -> {_yaml(value)}" for key, value in changed.items())


def shrink(recipe: RunConfig, kind: str = "vit", compared: bool = True) -> Shrunk:
    """What makes ``recipe`` small; shards and output are left to the caller.

    Args:
        recipe: a pre-training or an evaluation.
        kind: of an evaluation's encoder, if it names none.
        compared: runs on different numbers of ranks will be: without drop path, whose draws are each rank's own.
    """
    changes = _run(recipe)
    if isinstance(recipe, Recipe):
        changes |= _pre_training(recipe, compared)
        kept = _kept_of_pre_training(recipe)
    else:
        assert isinstance(recipe, ClassifyRecipe)
        changes |= _evaluation(recipe, kind, compared)
        kept = [f"protocol {recipe.classify.protocol}", "augmentation", f"layer decay {recipe.classify.layer_decay:g}"]
    kept += [f"ZeRO-{recipe.zero_stage}", recipe.optim.optimizer, f"schedule {recipe.optim.schedule}",
             "peak learning rate", f"activation checkpointing {recipe.activation_checkpointing}"]  # fmt: skip
    kept += [] if "precision" in changes else [recipe.precision]
    values = dict(flatten(to_dict(recipe)))
    return Shrunk(changes, {key: values.get(key) for key in changes}, ", ".join(kept))


def overrides(changes: Mapping[str, Any]) -> list[str]:
    """Changes as ``key=value``, for the command line."""
    return [f"{key}={_yaml(value)}" for key, value in changes.items()]


def _run(recipe: RunConfig) -> dict[str, Any]:
    """What every run has."""
    optim = recipe.optim
    scale = recipe.global_batch / optim.reference_batch
    changes: dict[str, Any] = {
        "epochs": LONG // STEPS_PER_EPOCH,
        "max_steps": STEPS,
        "global_batch": BATCH,
        "micro_batch": BATCH // 4,
        "optim.base_lr": optim.base_lr * scale,
        "optim.warmup_lr": optim.warmup_lr * scale,
        "optim.reference_batch": BATCH,
        "optim.warmup_epochs": min(optim.warmup_epochs, 0.5),
        "optim.decay_epochs": [1] if optim.decay_epochs else [],
        "data.workers": min(recipe.data.workers, 1),
        "data.streams": 2,
        "data.window": 1,
        "data.cache": None,
        "log_every": 1,
        "checkpoint_every": CHECKPOINT_EVERY,
        "tensorboard": False,
        "wandb": None,
        "resume": "auto",
        "compile": False,
    }
    if recipe.precision == "fp16":
        changes["precision"] = "bf16"  # few CPUs compute in fp16
    return changes


def _pre_training(recipe: Recipe, compared: bool) -> dict[str, Any]:
    method: Any = recipe.method
    encoder = method.encoder
    changes: dict[str, Any] = {"figure_images": 2, "data.image_size": image_size(encoder)}
    changes |= {"init": "", "init_family": None, "monitor.shards": "", "monitor.val_shards": ""}  # the user's files
    changes |= {f"method.encoder.{key}": value for key, value in _encoder(encoder, changes["data.image_size"]).items()}
    if compared and getattr(encoder, "drop_path", None):
        changes["method.encoder.drop_path"] = 0.0
    decoder = getattr(method, "decoder", None)
    if hasattr(decoder, "embed_dims"):
        changes |= {"method.decoder.embed_dims": [16] * 4, "method.decoder.num_heads": 2}
    elif decoder is not None:
        small = {"embed_dim": 32, "depth": min(decoder.depth, 2), "num_heads": 2}
        changes |= {f"method.decoder.{key}": value for key, value in small.items()}
    if encoder.kind in VITS and hasattr(method, "taps"):
        changes["method.taps"] = [0, 1, 2, 3] if hasattr(decoder, "embed_dims") else [0, 1, 3]
    if hasattr(method, "teacher"):  # timm's smallest; TEC fuses the layers by threes
        changes |= {"method.teacher.name": "test_vit", "method.teacher.checkpoint": "untrained"}
        changes["method.encoder.depth"] = 3
    if recipe.method.attention is not None:
        changes["method.attention.refresh_epochs"] = 1
    if recipe.mask.shared_by > 1:
        changes["mask.shared_by"] = SHARED
    return changes


def _kept_of_pre_training(recipe: Recipe) -> list[str]:
    method: Any = recipe.method
    name = type(method).__module__.rpartition(".")[2]
    kept = [f"method {name}", f"encoder {method.encoder.kind}", f"{recipe.mask.kind} mask of {recipe.mask.ratio:.0%}"]
    if recipe.mask.secondary_ratio:
        kept.append(f"secondary masking of {recipe.mask.secondary_ratio:.0%}")
    if recipe.throw_ratio:
        kept.append(
            f"{recipe.throw_ratio:.0%} thrown ({recipe.mask.throwing}), aggregation {recipe.partial.aggregation}"
        )
    return kept


def _evaluation(recipe: ClassifyRecipe, kind: str, compared: bool) -> dict[str, Any]:
    config = recipe.classify
    encoder = config.encoder or FRESH[kind]()
    side = image_size(encoder)
    changes: dict[str, Any] = {
        "data.image_size": side,
        "data.eval_resize": None if recipe.data.eval_resize is None else side * 8 // 7,
        "classify.weights": "",
        "classify.family": None,
        "classify.encoder": {**asdict(encoder), **_encoder(encoder, side)},
        "classify.classes": CLASSES,
        "classify.neighbours": min(config.neighbours, 5),
        "classify.last_blocks": min(config.last_blocks, 1),
    }
    if config.protocol == "linear":
        changes["micro_batch"] = BATCH  # its batch norm joins the micro-batches of all ranks to one
    if compared:
        changes["classify.drop_path"] = 0.0
    return changes


def image_size(encoder: Any) -> int:
    """The side in pixels of a shrunk encoder's images."""
    return VIT_PATCHES * encoder.patch_size if encoder.kind in VITS else SWIN_SIDE


def _encoder(encoder: Any, side: int) -> dict[str, Any]:
    small = dict(ENCODERS[encoder.kind])
    if hasattr(encoder, "window_size"):
        maps = [side // 4 // 2**stage for stage in range(4)]
        fits = all(tokens <= encoder.window_size or tokens % encoder.window_size == 0 for tokens in maps)
        small["window_size"] = encoder.window_size if fits and encoder.window_size < maps[0] else 4
    return small


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
