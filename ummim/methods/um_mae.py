"""UM-MAE: MAE for pyramid encoders. One patch of every 2x2 block stays, so the visible ones form a dense grid
of half the side; a quarter of those are hidden again (secondary masking) to keep the task hard.

Source: "Uniform Masking: Enabling MAE Pre-training for Pyramid-based Vision Transformers with Locality".

    image ── one patch in 2x2 ──> compact grid ──> Swin, PVT ──> embed, pixel shuffle ─┐
                  (a quarter of them the vis_mask_token)                               ├─> decoder ──> [aggregation]
                                                             mask tokens at kept ids ──┘     ──> head ──> masked pixels

On a ViT, which takes visible tokens as they come, the compact grid and the pixel shuffle fall away: MAE with a
lighter decoder and secondary masking.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from ummim.backbones.pvt import PVT, PVTBlock, PVTConfig
from ummim.backbones.pyramid import MASK_PATCH, TOKEN
from ummim.backbones.swin import Swin, SwinBlock, SwinConfig
from ummim.backbones.vit import ViT, ViTConfig
from ummim.masking import MaskPlan
from ummim.methods.api import Method, MethodConfig, MIMOutput, check_heads, check_patches, check_width
from ummim.nn.aggregation import PartialConfig, build_aggregation
from ummim.nn.decoder import Decoder, DecoderConfig, PixelHead
from ummim.nn.layers import init_mae
from ummim.nn.targets import mean_squared_error, pixel_targets


@dataclass(frozen=True)
class Config(MethodConfig):
    """UM-MAE on a Swin, a PVT or a ViT.

    Attributes:
        encoder: the encoder.
        decoder: the decoder.
        norm_pix_loss: regress pixels normalised by their patch's mean and deviation.
        legacy_decoder_order: give a pyramid's visible tokens the position embeddings in raster order, as the
            official code does, although they are in block order: three quarters of them get another patch's. For
            official checkpoints; off by default. A ViT's tokens get their own in the official code too.
    """

    encoder: SwinConfig | PVTConfig | ViTConfig = field(default_factory=SwinConfig)
    decoder: DecoderConfig = field(default_factory=lambda: DecoderConfig(depth=2))
    norm_pix_loss: bool = True
    legacy_decoder_order: bool = False

    @property
    def mask_kinds(self) -> tuple[str, ...]:
        return ("random", "uniform") if isinstance(self.encoder, ViTConfig) else ("uniform",)

    @property
    def secondary_masking(self) -> bool:
        return True

    @property
    def patch_size(self) -> int:
        """Side of a mask patch, in pixels."""
        return self.encoder.patch_size if isinstance(self.encoder, ViTConfig) else MASK_PATCH

    def mask_grid(self, image_size: int) -> tuple[int, int]:
        return image_size // self.patch_size, image_size // self.patch_size

    def check_sizes(self, image_size: int) -> Iterable[tuple[str, str]]:
        if isinstance(self.encoder, ViTConfig):
            yield from check_patches(image_size, self.encoder.patch_size)
            yield from check_width("method.encoder", self.encoder.embed_dim, self.encoder.num_heads)
            if self.legacy_decoder_order:
                yield "method.legacy_decoder_order", "the official ViT's order is right; set it to false"
        else:
            yield from check_pyramid(self.encoder, image_size, compact=True)
        yield from check_width("method.decoder", self.decoder.embed_dim, self.decoder.num_heads)

    def build(self, image_size: int, partial: PartialConfig, throwing: bool) -> "UMMAE":
        return UMMAE(image_size, self, partial, throwing)


class UMMAE(Method):
    """(B, 3, H, W) float images, normalised, and their mask plan (uniform for a pyramid) -> loss and predictions."""

    encoder: Swin | PVT | ViT

    def __init__(
        self,
        image_size: int,
        config: Config,
        partial: PartialConfig | None = None,
        throwing: bool = False,
        secondary: bool = True,
    ) -> None:
        super().__init__()
        dim = config.decoder.embed_dim
        self.patch_size = config.patch_size
        self.norm_pix_loss = config.norm_pix_loss
        self.legacy_decoder_order = config.legacy_decoder_order
        self.encoder = _build_encoder(image_size, config.encoder, secondary)
        self.grid = self.encoder.grid
        flat = isinstance(self.encoder, ViT)
        self.embed = nn.Linear(self.encoder.embed_dim, dim) if flat else ShuffleEmbed(self.encoder.embed_dim, dim)
        self.decoder = Decoder(self.grid, config.decoder, cls_token=flat)
        self.aggregation = build_aggregation(partial or PartialConfig(), throwing, self.grid, dim)
        self.head = PixelHead(dim, self.patch_size)
        self.embed.apply(init_mae)

    def blocks(self) -> list[nn.Module]:
        if isinstance(self.encoder, ViT):
            return [*self.encoder.blocks, *self.decoder.blocks]
        encoder = [module for module in self.encoder.modules() if isinstance(module, (SwinBlock, PVTBlock))]
        return [*encoder, *self.decoder.blocks]

    def forward(self, images: Tensor, plan: MaskPlan) -> MIMOutput:
        self.check_inputs(images, plan)
        latent = self.encoder(images, plan)  # a pyramid's (B, h/4, w/4, 8C), a ViT's (B, 1 + V, D)
        visible_at = plan.visible.sort(dim=1).values if self.legacy_decoder_order else None
        visible, kept = self.decoder(self.embed(latent), plan, visible_at)  # (B, V, d), (B, K, d)
        tokens, ids = self.aggregation(visible, kept, plan, self.head.norm)  # (B, n, d), (B, n)
        pixels = self.head.pred(tokens)  # (B, n, p * p * 3)
        target = pixel_targets(images, ids, self.patch_size, self.norm_pix_loss)
        return MIMOutput(mean_squared_error(pixels, target), pixels, ids, self.grid[0] * self.grid[1])


class ShuffleEmbed(nn.Linear):
    """Last-stage tokens, each over 2x2 visible patches, to a token of each patch: a linear map and a pixel shuffle."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__(dim, 4 * out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h/4, w/4, C) -> (B, V, d), in the plan's block order."""
        x = F.pixel_shuffle(super().forward(x).permute(0, 3, 1, 2), 2)  # (B, d, h/2, w/2)
        return x.flatten(2).transpose(1, 2)


def check_pyramid(encoder: SwinConfig | PVTConfig, image_size: int, compact: bool) -> Iterable[tuple[str, str]]:
    """The complaints of sizes that give a pyramid no four stages, on the compact or the whole grid."""
    token = 2 * TOKEN if compact else TOKEN  # pixels per token of the first stage's map
    unit = 8 * token
    if image_size % unit:
        near = max(unit, round(image_size / unit) * unit)
        problem = "do not compact to four stages" if compact else "do not make four stages"
        yield "data.image_size", f"{image_size} pixels {problem}: use a multiple of {unit}, such as {near}"
    for stage in range(4):
        side = max(image_size // (token * 2**stage), 1)  # of the stage's map
        if isinstance(encoder, PVTConfig):
            ratio, dim = encoder.sr_ratios[stage], encoder.embed_dims[stage]
            if ratio < 1 or side % ratio:
                yield (
                    "method.encoder.sr_ratios",
                    f"squares of {ratio} do not divide the {side}x{side} tokens of stage {stage + 1}; "
                    f"choose a divisor of {side}",
                )
        else:
            dim = encoder.embed_dim * 2**stage
            window = min(encoder.window_size, side)
            if window < 1 or side % window:
                yield (
                    "method.encoder.window_size",
                    f"a window of {encoder.window_size} does not divide the {side}x{side} tokens of stage {stage + 1}; "
                    f"choose a divisor of {side}",
                )
        yield from check_heads("method.encoder", dim, encoder.num_heads[stage])
    if isinstance(encoder, PVTConfig) and (encoder.embed_dims[0] < 4 or encoder.embed_dims[0] % 4):
        first = encoder.embed_dims[0]
        yield "method.encoder.embed_dims", f"the position table needs a positive multiple of 4, not {first}"


def _build_encoder(image_size: int, config: SwinConfig | PVTConfig | ViTConfig, secondary: bool) -> Swin | PVT | ViT:
    if isinstance(config, ViTConfig):
        return ViT(image_size, config, secondary)
    if isinstance(config, PVTConfig):
        return PVT(image_size, config, secondary=secondary)
    return Swin(image_size, config, secondary=secondary)
