"""The small models of accuracy_study.py: what is pre-trained, and the classifier that its encoder becomes."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accuracy_rows import NONE, Row
from safetensors.torch import load_file
from small_study import Classifier
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ummim.backbones.relative_vit import RelativeViT, RelativeViTConfig
from ummim.backbones.teacher import Teacher
from ummim.backbones.vit import ViT, ViTConfig
from ummim.methods import mae, simmim, tec
from ummim.methods.api import Method
from ummim.nn.aggregation import PartialConfig
from ummim.nn.decoder import DecoderConfig

IMAGE_SIZE, PATCH, GRID = 28, 2, (14, 14)


@dataclass(frozen=True)
class Model:
    width: int = 64
    depth: int = 4
    heads: int = 2
    decoder_width: int = 48
    decoder_depth: int = 2
    decoder_heads: int = 2
    norm_pix_loss: bool = False

    @property
    def decoder(self) -> DecoderConfig:
        return DecoderConfig(self.decoder_width, self.decoder_depth, self.decoder_heads)

    def vit(self, method: str) -> ViTConfig:
        depth = 3 if method == "tec" else self.depth  # TEC fuses three layers at a time
        return ViTConfig(patch_size=PATCH, embed_dim=self.width, depth=depth, num_heads=self.heads)

    def relative_vit(self) -> RelativeViTConfig:
        return RelativeViTConfig(
            patch_size=PATCH, embed_dim=self.width, depth=self.depth, num_heads=self.heads, drop_path=0.0
        )


def method_of(row: Row, model: Model, partial: PartialConfig, throwing: bool, teacher: Path) -> Method:
    """The row's method with fresh weights; ``teacher`` holds the encoder that TEC learns from."""
    if row.method == "simmim":
        return simmim.Config(encoder=model.relative_vit()).build(IMAGE_SIZE, partial, throwing)
    if row.method == "tec":
        lesson = tec.Config(model.vit("tec"), model.decoder, attention_pass=row.attention_pass)
        return tec.TEC(IMAGE_SIZE, lesson, teacher_of(model, teacher), partial, throwing)
    config = mae.Config(encoder=model.vit("mae"), decoder=model.decoder, norm_pix_loss=model.norm_pix_loss)
    return config.build(IMAGE_SIZE, partial, throwing)


def build(row: Row, model: Model, seed: int, teacher: Path = Path()) -> Method:
    """The row's method; what all rows of a method have starts from the same weights, whatever the aggregation draws."""
    torch.manual_seed(seed)
    full = method_of(row, model, NONE, False, teacher)
    torch.manual_seed(seed)
    method = method_of(row, model, row.partial, row.ratio > 0, teacher)
    method.load_state_dict(full.state_dict(), strict=False)
    return method


def teacher_of(model: Model, weights: Path) -> Teacher:
    """The encoder that full reconstruction gave, as TEC's teacher; untrained where ``weights`` names no file."""
    vit = VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=PATCH,
        embed_dim=model.width,
        depth=model.depth,
        num_heads=model.heads,
        num_classes=0,
    )
    if weights.is_file():
        vit.load_state_dict(load_file(weights))
    vit.norm = nn.Identity()
    return Teacher(vit, layers=1, top_k=9)


def mean_of_tokens(tokens: Tensor) -> Tensor:
    return tokens[:, 1:].mean(1)  # (B, D), without the class token


def classifier(method: str, model: Model, seed: int, weights: Path | None) -> Classifier:
    """A dense encoder with the weights at ``weights``, or fresh, and a fresh head on the mean of its tokens."""
    torch.manual_seed(seed)
    encoder: nn.Module
    if method == "simmim":
        encoder = RelativeViT(IMAGE_SIZE, model.relative_vit())
    else:
        encoder = ViT(IMAGE_SIZE, model.vit(method))
    if weights is not None:
        encoder.load_state_dict(load_file(weights))
    return Classifier(encoder, mean_of_tokens, model.width)
