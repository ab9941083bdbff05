"""The task of an evaluation that trains: uint8 images and labels in, a loss out; and how its model is put together."""

from dataclasses import replace
from typing import Any

from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from ummim.backbones.relative_vit import RelativeViT
from ummim.backbones.table_swin import TableSwin
from ummim.backbones.vit import ViT
from ummim.data.augment_labelled import seeded
from ummim.data.labelled import LabelledBatch
from ummim.data.normalise import normalise
from ummim.downstream.adapt import Encoder, new_encoder
from ummim.downstream.classify import Classifier, build_classifier
from ummim.downstream.probe import Probe
from ummim.downstream.recipe import ClassifyConfig, ClassifyRecipe
from ummim.engine.optim import layer_decay_groups
from ummim.engine.trainer import TaskOutput
from ummim.errors import RecipeError, UserError
from ummim.nn.layers import eps_of, set_eps

VIT_EPS = 1e-6  # of a ViT's norms, but in some of other libraries


class Classification(nn.Module):
    """What the engine trains: ``task(batch) -> TaskOutput``. Its one metric is ``train_top1``, in percent of the
    micro-batch, where images are not mixed.

    Images are mixed by timm's Mixup: whether, how much and with which box follows from seed and optimizer step; with
    whom, from the micro-batch (the first with the last, and so on). That alone depends on how a batch is cut.
    """

    def __init__(self, model: Classifier | Probe, config: ClassifyConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.frozen = _freeze(model, config.last_blocks) if config.protocol == "partial" else []
        self.soft = SoftTargetCrossEntropy()
        self.mixup = mixing(config)

    def blocks(self) -> list[nn.Module]:
        """The units of activation checkpointing."""
        return self.model.blocks()

    def train(self, mode: bool = True) -> "Classification":
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The optimizer's groups: by layer where ``layer_decay`` is not 1."""
        ids = {name: 0 for name, _ in self.model.named_parameters()}
        exempt: set[str] = set()
        if isinstance(self.model, Classifier):
            exempt = self.model.no_weight_decay()
            if self.config.layer_decay != 1:
                ids = self.model.layer_ids()
        return layer_decay_groups(self.model, ids, self.config.layer_decay, weight_decay, exempt)

    def forward(self, batch: LabelledBatch) -> TaskOutput:
        images, labels = normalise(batch.images), batch.labels
        if self.mixup is None:
            logits = self.model(images).float()
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
            return TaskOutput(loss, {"train_top1": 100 * (logits.detach().argmax(1) == labels).float().mean()})
        with seeded(batch.mixing):
            images, targets = self.mixup(images, labels)  # (B, 3, H, W), (B, classes)
        return TaskOutput(self.soft(self.model(images).float(), targets), {})

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, classes) float32."""
        return self.model(normalise(images)).float()


def mixing(config: ClassifyConfig) -> Mixup | None:
    """What mixes the images of a micro-batch with each other, if anything does."""
    if not config.mixes:
        return None
    return Mixup(
        config.mixup, config.cutmix, prob=config.mixup_prob, switch_prob=config.mixup_switch,
        label_smoothing=config.label_smoothing, num_classes=config.classes,
    )  # fmt: skip


def _freeze(model: Any, last_blocks: int) -> list[nn.Module]:
    """Freeze all below the last blocks; returns the blocks that are frozen."""
    blocks, ids = model.blocks(), model.layer_ids()
    if last_blocks > len(blocks):
        raise RecipeError(f"classify.last_blocks = {last_blocks}: the encoder has {len(blocks)} blocks: use fewer")
    first = len(blocks) + 1 - last_blocks  # the lowest layer that is trained
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(ids[name] >= first)
    return blocks[: len(blocks) - last_blocks]


def build_model(recipe: ClassifyRecipe, encoder: Encoder) -> Classifier | Probe:
    """The recipe's model on an encoder for whole images, freshly initialised but for that.

    Raises:
        UserError: what the recipe asks of it does not fit the encoder.
    """
    config = recipe.classify
    classifier = build_classifier(
        encoder, config.classes, config.pool, config.drop_path, recipe.data.image_size, config.train_positions,
        config.norm_last,
    )  # fmt: skip
    if config.protocol in ("linear", "attentive"):
        return Probe(classifier, config.classes, config.protocol == "attentive")
    return classifier


def resolved(recipe: ClassifyRecipe, encoder: Encoder) -> ClassifyRecipe:
    """The recipe with the encoder's sizes in it, so that a run can be read without the weights that it started from.

    Raises:
        UserError: they are not those that the recipe asks for.
    """
    asked, found = recipe.classify.encoder, encoder.config
    if asked is not None and asked != found:
        raise UserError(f"classify.encoder: the weights are of {found}, not {asked}: change or remove it")
    eps = None
    if isinstance(encoder, TableSwin) or (isinstance(encoder, ViT | RelativeViT) and eps_of(encoder) != VIT_EPS):
        eps = eps_of(encoder)
    return replace(recipe, classify=replace(recipe.classify, encoder=found, norm_eps=eps))


def encoder_from_scratch(recipe: ClassifyRecipe) -> Encoder:
    """A fresh encoder of the recipe's sizes for whole images.

    Raises:
        UserError: sizes that do not fit each other.
    """
    config = recipe.classify.encoder
    assert config is not None  # ClassifyConfig.check
    encoder = new_encoder(config, recipe.data.image_size)
    if recipe.classify.norm_eps is not None:
        set_eps(encoder, recipe.classify.norm_eps)
    return encoder
