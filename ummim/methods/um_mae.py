"""UM-MAE: MAE for pyramid encoders. One patch of every 2x2 block stays, so the visible ones form a dense grid
of half the side; a quarter of those are hidden again (secondary masking) to keep the task hard.

Source: "Uniform Masking: Enabling MAE Pre-training for Pyramid-based Vision Transformers with Locality".

    image ── one patch in 2x2 ──> compact grid ──> Swin ──> embed, pixel shuffle ─┐
                  (a quarter of them the vis_mask_token)                          ├─> decoder ──> [aggregation]
                                                        mask tokens at kept ids ──┘      ──> head ──> masked pixels
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ummim.backbones.swin import MASK_PATCH, TOKEN, Swin, SwinBlock, SwinConfig
from ummim.masking import MaskPlan
from ummim.methods.api import Method, MethodConfig, MIMOutput, check_heads, check_width
from ummim.nn.aggregation import PartialConfig, build_aggregation
from ummim.nn.decoder import Decoder, DecoderConfig, PixelHead
from ummim.nn.layers import init_mae
from ummim.nn.targets import mean_squared_error, pixel_targets


@dataclass(frozen=True)
class Config(MethodConfig):
    """UM-MAE on a Swin.

    Attributes:
        encoder: the Swin.
        decoder: the decoder.
        norm_pix_loss: regress pixels normalised by their patch's mean and deviation.
        legacy_decoder_order: give the visible tokens the position embeddings in raster order, as the official
            code does, although they are in block order: three quarters of them get another patch's. For
            official checkpoints; off by default.
    """

    mask_kinds: ClassVar[tuple[str, ...]] = ("uniform",)
    secondary_masking: ClassVar[bool] = True

    encoder: SwinConfig = field(default_factory=SwinConfig)
    decoder: DecoderConfig = field(default_factory=lambda: DecoderConfig(depth=2))
    norm_pix_loss: bool = True
    legacy_decoder_order: bool = False

    def mask_grid(self, image_size: int) -> tuple[int, int]:
        return image_size // MASK_PATCH, image_size // MASK_PATCH

    def check_sizes(self, image_size: int) -> Iterable[tuple[str, str]]:
        encoder, unit = self.encoder, 4 * MASK_PATCH
        if image_size % unit:
            near = max(unit, round(image_size / unit) * unit)
            yield (
                "data.image_size",
                f"{image_size} pixels do not compact to four Swin stages: use a multiple of {unit}, such as {near}",
            )
        for stage in range(4):
            grid = image_size // (2 * TOKEN * 2**stage)  # side of the stage's compact map
            window = min(encoder.window_size, max(grid, 1))
            if window < 1 or grid % window:
                yield (
                    "method.encoder.window_size",
                    f"a window of {encoder.window_size} does not divide the {grid}x{grid} tokens of stage {stage + 1}",
                )
            yield from check_heads("method.encoder", encoder.embed_dim * 2**stage, encoder.num_heads[stage])
        yield from check_width("method.decoder", self.decoder.embed_dim, self.decoder.num_heads)

    def build(self, image_size: int, partial: PartialConfig, throwing: bool) -> "UMMAE":
        return UMMAE(image_size, self, partial, throwing)


class UMMAE(Method):
    """(B, 3, H, W) float images, normalised, and their uniform mask plan -> loss and predictions."""

    encoder: Swin

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
        self.patch_size = MASK_PATCH
        self.norm_pix_loss = config.norm_pix_loss
        self.legacy_decoder_order = config.legacy_decoder_order
        self.encoder = Swin(image_size, config.encoder, secondary)
        self.grid = self.encoder.grid
        self.embed = nn.Linear(self.encoder.embed_dim, 4 * dim)
        self.decoder = Decoder(self.grid, config.decoder, cls_token=False)
        self.aggregation = build_aggregation(partial or PartialConfig(), throwing, dim)
        self.head = PixelHead(dim, self.patch_size)
        self.embed.apply(init_mae)

    def blocks(self) -> list[nn.Module]:
        encoder = [module for module in self.encoder.modules() if isinstance(module, SwinBlock)]
        return [*encoder, *self.decoder.blocks]

    def forward(self, images: Tensor, plan: MaskPlan) -> MIMOutput:
        self.check_inputs(images, plan)
        x = self.encoder(images, plan)  # (B, h/4, w/4, 8C): each token covers 2x2 visible patches
        x = F.pixel_shuffle(self.embed(x).permute(0, 3, 1, 2), 2)  # (B, d, h/2, w/2)
        x = x.flatten(2).transpose(1, 2)  # (B, V, d), in the plan's block order
        visible_at = plan.visible.sort(dim=1).values if self.legacy_decoder_order else None
        visible, kept = self.decoder(x, plan, visible_at)  # (B, V, d), (B, K, d)
        tokens, ids = self.aggregation(visible, kept, plan)  # (B, n, d), (B, n)
        pixels = self.head(tokens)  # (B, n, p * p * 3)
        target = pixel_targets(images, ids, self.patch_size, self.norm_pix_loss)
        return MIMOutput(mean_squared_error(pixels, target), pixels, ids, self.grid[0] * self.grid[1])
