"""GreenMIM: MAE for Swin. Masks are of 32-pixel units; the encoder works on the visible ones only, its windows
packed into groups, so that a batch shares one mask.

Source: "Green Hierarchical Vision Transformer for Masked Image Modeling" (Huang et al., NeurIPS 2022), section 3.

    image ── visible units ──> sparse Swin ──> embed ─┐
                                                      ├─> decoder ──> [aggregation] ──> head ──> masked pixels
                             mask tokens at kept ids ─┘
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from ummim.backbones.sparse_swin import SparseSwin
from ummim.backbones.table_swin import UNIT, TableSwinConfig
from ummim.masking import MaskPlan
from ummim.methods.api import Method, MethodConfig, MIMOutput, check_swin, check_width
from ummim.nn.aggregation import PartialConfig, build_aggregation
from ummim.nn.decoder import Decoder, DecoderConfig, PixelHead
from ummim.nn.layers import init_mae
from ummim.nn.targets import mean_squared_error, pixel_targets


@dataclass(frozen=True)
class Config(MethodConfig):
    """GreenMIM on a Swin.

    Attributes:
        encoder: the Swin.
        decoder: the decoder.
        norm_pix_loss: regress pixels normalised by their unit's mean and deviation.
        row_major_merge: merge 2x2 tokens in the order of the official code's first release, before January 2023,
            instead of Swin's. For official checkpoints of that time; off by default.
    """

    encoder: TableSwinConfig = field(default_factory=TableSwinConfig)
    decoder: DecoderConfig = field(default_factory=lambda: DecoderConfig(depth=1))
    norm_pix_loss: bool = True
    row_major_merge: bool = False

    @property
    def shared_mask(self) -> bool:
        return True

    @property
    def static_shapes(self) -> bool:
        return False

    def mask_grid(self, image_size: int) -> tuple[int, int]:
        return image_size // UNIT, image_size // UNIT

    def check_sizes(self, image_size: int) -> Iterable[tuple[str, str]]:
        yield from check_swin(self.encoder, image_size)
        yield from check_width("method.decoder", self.decoder.embed_dim, self.decoder.num_heads)

    def build(self, image_size: int, partial: PartialConfig, throwing: bool) -> "GreenMIM":
        return GreenMIM(image_size, self, partial, throwing)


class GreenMIM(Method):
    """(B, 3, H, W) float images, normalised, and a mask plan that they share -> loss and predictions."""

    encoder: SparseSwin

    def __init__(
        self, image_size: int, config: Config, partial: PartialConfig | None = None, throwing: bool = False
    ) -> None:
        super().__init__()
        dim = config.decoder.embed_dim
        self.patch_size = UNIT
        self.norm_pix_loss = config.norm_pix_loss
        self.encoder = SparseSwin(image_size, config.encoder, config.row_major_merge)
        self.grid = self.encoder.grid
        self.embed = nn.Linear(self.encoder.embed_dim, dim)
        self.decoder = Decoder(self.grid, config.decoder, cls_token=False)
        self.aggregation = build_aggregation(partial or PartialConfig(), throwing, self.grid, dim)
        self.head = PixelHead(dim, self.patch_size)
        self.embed.apply(init_mae)

    def blocks(self) -> list[nn.Module]:
        return [*self.encoder.blocks(), *self.decoder.blocks]

    def forward(self, images: Tensor, plan: MaskPlan) -> MIMOutput:
        self.check_inputs(images, plan)
        latent = self.encoder(images, plan)  # (B, V, 8C)
        visible, kept = self.decoder(self.embed(latent), plan)  # (B, V, d), (B, K, d)
        tokens, ids = self.aggregation(visible, kept, plan, self.head.norm)  # (B, n, d), (B, n)
        pixels = self.head.pred(tokens)  # (B, n, p * p * 3)
        target = pixel_targets(images, ids, self.patch_size, self.norm_pix_loss)
        return MIMOutput(mean_squared_error(pixels, target), pixels, ids, self.grid[0] * self.grid[1])
