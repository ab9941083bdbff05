"""SimMIM: put a mask token in the place of masked patches, encode all, regress the masked pixels with one layer.

Source: "SimMIM: A Simple Framework for Masked Image Modeling", sections 3 and 4.1; for UM-MAE's Swin and PVT the
SimMIM baselines of UM-MAE's official code.

    image ── visible patches ─┐
                              ├─> encoder ──> [aggregation] ──> norm ──> linear head ──> masked pixels, L1
    mask tokens at kept ids ──┘

Thrown tokens (PR-MIM) leave the encoder's sequence, for here the encoder is what reconstructs. Only a ViT can do
that: attention windows and merges need every token of the map.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ummim.backbones.pvt import PVT, PVTConfig
from ummim.backbones.pyramid import MASK_PATCH
from ummim.backbones.relative_vit import RelativeViT, RelativeViTConfig
from ummim.backbones.swin import Swin, SwinConfig
from ummim.backbones.table_swin import UNIT, TableSwin, TableSwinConfig
from ummim.errors import RecipeError
from ummim.masking import MaskPlan
from ummim.methods.api import Method, MethodConfig, MIMOutput, check_heads, check_patches, check_swin
from ummim.methods.um_mae import ShuffleEmbed, check_pyramid
from ummim.nn.aggregation import PartialConfig, build_aggregation
from ummim.nn.layers import init_mae, take
from ummim.nn.targets import pixel_targets


@dataclass(frozen=True)
class Config(MethodConfig):
    """SimMIM on its own ViT and Swin, or on UM-MAE's Swin and PVT.

    The mask grid is the ViT's patches, Swin's 32-pixel units, or the 16-pixel patches of UM-MAE's encoders. SimMIM
    masks ViT patches in 32-pixel units as well: ``mask.unit`` 2 at 16-pixel patches.

    Weight decay (docs/fidelity.md, Q-S1 and Q-S2): as in every recipe here, one-dimensional parameters and biases are
    spared and all else is decayed. The official pre-training decays relative position tables too, against its
    intent, and the ViT's mask token; it spares Swin's mask token and the ViT's class token, which are decayed here.

    Attributes:
        encoder: the encoder, by its ``kind``: ``relative_vit`` and ``swin`` are SimMIM's, ``um_swin`` and ``pvt``
            UM-MAE's.
        norm_pix_loss: regress pixels normalised by their patch's mean and deviation; no published SimMIM does.
    """

    encoder: RelativeViTConfig | TableSwinConfig | SwinConfig | PVTConfig = field(default_factory=RelativeViTConfig)
    norm_pix_loss: bool = False

    @property
    def partial_reconstruction(self) -> bool:
        """Only a ViT can leave tokens out: windows and merges need every token of the map."""
        return isinstance(self.encoder, RelativeViTConfig)

    @property
    def patch_size(self) -> int:
        """Side of a mask patch, in pixels."""
        if isinstance(self.encoder, RelativeViTConfig):
            return self.encoder.patch_size
        return UNIT if isinstance(self.encoder, TableSwinConfig) else MASK_PATCH

    def mask_grid(self, image_size: int) -> tuple[int, int]:
        return image_size // self.patch_size, image_size // self.patch_size

    def check_sizes(self, image_size: int) -> Iterable[tuple[str, str]]:
        encoder = self.encoder
        if isinstance(encoder, (SwinConfig, PVTConfig)):
            yield from check_pyramid(encoder, image_size, compact=False)
            return
        if isinstance(encoder, TableSwinConfig):
            yield from check_swin(encoder, image_size)
        else:
            yield from check_patches(image_size, encoder.patch_size)
            yield from check_heads("method.encoder", encoder.embed_dim, encoder.num_heads)

    def build(self, image_size: int, partial: PartialConfig, throwing: bool) -> "SimMIM":
        encoder, transformer = self.encoder, throwing and partial.aggregation == "transformer"
        if transformer and isinstance(encoder, RelativeViTConfig) and encoder.embed_dim % 4:
            raise RecipeError(
                "partial.aggregation = 'transformer': its position table needs tokens of a multiple of 4 channels, not"
                f" {encoder.embed_dim}; choose conv, or another method.encoder.embed_dim"
            )
        return SimMIM(image_size, self, partial, throwing)


class SimMIM(Method):
    """(B, 3, H, W) float images, normalised, and their mask plan -> loss and predictions."""

    encoder: RelativeViT | TableSwin | Swin | PVT

    def __init__(
        self, image_size: int, config: Config, partial: PartialConfig | None = None, throwing: bool = False
    ) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.norm_pix_loss = config.norm_pix_loss
        self.encoder = _build_encoder(image_size, config)
        self.grid = self.encoder.grid
        dim = self.encoder.embed_dim
        if isinstance(self.encoder, (Swin, PVT)):
            # UM-MAE's: a last-stage token covers 2x2 patches, and the loss is the plain mean.
            self.head: nn.Module = ShuffleEmbed(dim, self.patch_size**2 * 3)
            self.head.apply(init_mae)
            self.epsilon = 0.0
        else:
            self.head = PixelHead(dim, self.patch_size)
            self.epsilon = 1e-5
        self.aggregation = build_aggregation(partial or PartialConfig(), throwing, self.grid, dim)

    def blocks(self) -> list[nn.Module]:
        if isinstance(self.encoder, RelativeViT):
            return list(self.encoder.blocks)
        stages = self.encoder.layers if isinstance(self.encoder, TableSwin) else self.encoder.stages
        return [block for stage in stages for block in stage.blocks]  # type: ignore[union-attr]

    def predict(self, images: Tensor, plan: MaskPlan) -> tuple[Tensor, Tensor]:
        """Pixels (B, n, p * p * 3), channel-last, and the ids (B, n) of their patches."""
        x = self.encoder(images, plan)  # the ViT's (B, V + K, D) before its norm, others' normed (B, h', w', C)
        if isinstance(self.encoder, RelativeViT):
            visible, kept = x.split([plan.visible.shape[1], plan.kept.shape[1]], dim=1)
            tokens, ids = self.aggregation(visible, kept, plan, self.encoder.norm)  # (B, n, D), (B, n)
            return self.head(tokens), ids
        if plan.thrown.shape[1]:
            raise ValueError("this encoder needs every token of the map: it takes no plan with thrown tokens")
        if isinstance(self.encoder, TableSwin):
            return self.head(take(x.flatten(1, 2), plan.kept)), plan.kept  # a unit is one last-stage token
        return take(self.head(x), plan.kept), plan.kept

    def forward(self, images: Tensor, plan: MaskPlan) -> MIMOutput:
        self.check_inputs(images, plan)
        predicted, ids = self.predict(images, plan)  # (B, n, p * p * 3), (B, n)
        target = pixel_targets(images, ids, self.patch_size, self.norm_pix_loss)
        loss = absolute_error(predicted, target, self.epsilon)
        return MIMOutput(loss, predicted, ids, self.grid[0] * self.grid[1])


class PixelHead(nn.Linear):
    """A patch's pixels by one linear layer.

    Officially a 1x1 convolution and a pixel shuffle on the whole map, so the layer's outputs are channel-major. Both
    leave PyTorch's initialisation, which is the same for the two.
    """

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__(dim, 3 * patch**2)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, p * p * 3), channel-last."""
        b, n, _ = tokens.shape
        return super().forward(tokens).view(b, n, 3, -1).transpose(2, 3).flatten(2)


def absolute_error(predicted: Tensor, target: Tensor, epsilon: float) -> Tensor:
    """Scalar: absolute error summed over masked pixels, divided by their number plus epsilon, and by 3 channels.

    The number is a float32, as in the official code, where the 1e-5 is lost beside more than a few hundred pixels.
    """
    pixels = torch.full((), target.numel() // 3, dtype=torch.float32, device=target.device) + epsilon
    return (predicted.to(target.dtype) - target).abs().sum() / pixels / 3


def _build_encoder(image_size: int, config: Config) -> RelativeViT | TableSwin | Swin | PVT:
    encoder = config.encoder
    if isinstance(encoder, RelativeViTConfig):
        return RelativeViT(image_size, encoder)
    if isinstance(encoder, TableSwinConfig):
        return TableSwin(image_size, encoder)
    if isinstance(encoder, SwinConfig):
        return Swin(image_size, encoder, hiding="replace", secondary=False)
    return PVT(image_size, encoder, hiding="replace", secondary=False)
