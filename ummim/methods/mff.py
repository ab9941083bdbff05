"""MFF: MAE whose encoder hands the decoder a fusion of several layers, so that the last one need not carry the
low-level detail that pixels ask for.

Source: "Improving Pixel-based MIM by Reducing Wasted Modeling Capability" (Liu et al., ICCV 2023), section 3, as
implemented in mmpretrain.

    image ── visible patches ──> ViT ──┬── block  1 ──> linear ─┐
                                       ├── ...    ──> linear ───┼─> weighted sum ──> norm ──> embed ─┐
                                       └── block 12 ────────────┘                                    ├─> decoder ...
                                                                            mask tokens at kept ids ─┘   as in MAE
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ummim.backbones.vit import ViT, ViTConfig
from ummim.errors import RecipeError
from ummim.masking import MaskConfig, MaskPlan
from ummim.methods.api import Method, MethodConfig, MIMOutput, check_patches, check_width
from ummim.nn.aggregation import PartialConfig, build_aggregation
from ummim.nn.decoder import Decoder, DecoderConfig, PixelHead
from ummim.nn.layers import init_mae
from ummim.nn.targets import mean_squared_error, pixel_targets


@dataclass(frozen=True)
class Config(MethodConfig):
    """MFF on a ViT.

    Attributes:
        encoder: the ViT.
        decoder: the decoder, MAE's.
        taps: indices of the blocks that are fused, from 0, ascending; the last one enters as it is.
        norm_pix_loss: regress pixels normalised by their patch's mean and deviation.
    """

    encoder: ViTConfig = field(default_factory=ViTConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    taps: tuple[int, ...] = (0, 2, 4, 6, 8, 11)
    norm_pix_loss: bool = True

    def mask_grid(self, image_size: int) -> tuple[int, int]:
        return image_size // self.encoder.patch_size, image_size // self.encoder.patch_size

    def check_sizes(self, image_size: int) -> Iterable[tuple[str, str]]:
        depth = self.encoder.depth
        yield from check_patches(image_size, self.encoder.patch_size)
        yield from check_width("method.encoder", self.encoder.embed_dim, self.encoder.num_heads)
        yield from check_width("method.decoder", self.decoder.embed_dim, self.decoder.num_heads)
        if not self.taps or list(self.taps) != sorted(set(self.taps) & set(range(depth))):
            yield "method.taps", f"must be ascending indices of the encoder's {depth} blocks, from 0 to {depth - 1}"

    def check(self, image_size: int, mask: MaskConfig, throw_ratio: float) -> None:
        super().check(image_size, mask, throw_ratio)
        if self.taps[-1] != self.encoder.depth - 1:
            raise RecipeError(
                f"the blocks behind {self.taps[-1]} would not be trained: end with {self.encoder.depth - 1}",
                key="method.taps",
            )

    def build(self, image_size: int, partial: PartialConfig, throwing: bool) -> "MFF":
        return MFF(image_size, self, partial, throwing)


class Fusion(nn.Module):
    """The weighted sum of several layers' tokens, all but the last projected first; the weights add up to 1."""

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.proj_layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers - 1))
        self.proj_weights = nn.Parameter(torch.ones(layers, 1, 1, 1))
        self.apply(init_mae)

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        """Tensors of one shape (B, n, D), one for each layer -> (B, n, D)."""
        *lower, last = layers
        projected = [proj(tokens) for proj, tokens in zip(self.proj_layers, lower, strict=True)]
        return (self.proj_weights.softmax(0) * torch.stack([*projected, last])).sum(0)


class MFF(Method):
    """(B, 3, H, W) float images, normalised, and their mask plan -> loss and predictions."""

    encoder: ViT

    def __init__(
        self, image_size: int, config: Config, partial: PartialConfig | None = None, throwing: bool = False
    ) -> None:
        super().__init__()
        dim = config.decoder.embed_dim
        self.patch_size = config.encoder.patch_size
        self.norm_pix_loss = config.norm_pix_loss
        self.taps = config.taps
        self.encoder = ViT(image_size, config.encoder)
        self.grid = self.encoder.grid
        self.fusion = Fusion(config.encoder.embed_dim, len(config.taps))
        self.embed = nn.Linear(config.encoder.embed_dim, dim)
        self.decoder = Decoder(self.grid, config.decoder, cls_token=True)
        self.aggregation = build_aggregation(partial or PartialConfig(), throwing, self.grid, dim)
        self.head = PixelHead(dim, self.patch_size)
        self.embed.apply(init_mae)
        for name, parameter in self.encoder.named_parameters():  # mmpretrain's one difference to MAE
            if name.endswith(("mlp.fc1.bias", "mlp.fc2.bias")):
                nn.init.normal_(parameter, std=1e-6)

    def blocks(self) -> list[nn.Module]:
        return [*self.encoder.blocks, *self.decoder.blocks]

    def forward(self, images: Tensor, plan: MaskPlan) -> MIMOutput:
        self.check_inputs(images, plan)
        layers = self.encoder.features(images, plan, self.taps)  # of (B, 1 + V, D)
        latent = self.encoder.norm(self.fusion(layers))  # (B, 1 + V, D)
        visible, kept = self.decoder(self.embed(latent), plan)  # (B, V, d), (B, K, d)
        tokens, ids = self.aggregation(visible, kept, plan, self.head.norm)  # (B, n, d), (B, n)
        pixels = self.head.pred(tokens)  # (B, n, p * p * 3)
        target = pixel_targets(images, ids, self.patch_size, self.norm_pix_loss)
        return MIMOutput(mean_squared_error(pixels, target), pixels, ids, self.grid[0] * self.grid[1])
