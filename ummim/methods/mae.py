"""MAE: drop three quarters of the patches, encode the rest, decode all, regress the masked pixels.

Source: "Masked Autoencoders Are Scalable Vision Learners", sections 3 and A.1.

    image ── visible patches ──> ViT ──> embed ─┐
                                                ├─> decoder ──> [aggregation] ──> head ──> masked pixels
                       mask tokens at kept ids ─┘
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from ummim.backbones.vit import ViT, ViTConfig
from ummim.masking import MaskPlan
from ummim.methods.api import Method, MethodConfig, MIMOutput, check_patches, check_width
from ummim.nn.aggregation import PartialConfig, build_aggregation
from ummim.nn.decoder import Decoder, DecoderConfig, PixelHead
from ummim.nn.layers import init_mae
from ummim.nn.targets import mean_squared_error, pixel_targets


@dataclass(frozen=True)
class Config(MethodConfig):
    """MAE on a ViT.

    Attributes:
        encoder: the ViT.
        decoder: the decoder.
        norm_pix_loss: regress pixels normalised by their patch's mean and deviation.
    """

    encoder: ViTConfig = field(default_factory=ViTConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    norm_pix_loss: bool = True

    def mask_grid(self, image_size: int) -> tuple[int, int]:
        return image_size // self.encoder.patch_size, image_size // self.encoder.patch_size

    def check_sizes(self, image_size: int) -> Iterable[tuple[str, str]]:
        yield from check_patches(image_size, self.encoder.patch_size)
        yield from check_width("method.encoder", self.encoder.embed_dim, self.encoder.num_heads)
        yield from check_width("method.decoder", self.decoder.embed_dim, self.decoder.num_heads)

    def build(self, image_size: int, partial: PartialConfig, throwing: bool) -> Method:
        return MAE(image_size, self, partial, throwing)


class MAE(Method):
    """(B, 3, H, W) float images, normalised, and their mask plan -> loss and predictions."""

    encoder: ViT

    def __init__(
        self, image_size: int, config: Config, partial: PartialConfig | None = None, throwing: bool = False
    ) -> None:
        super().__init__()
        dim = config.decoder.embed_dim
        self.patch_size = config.encoder.patch_size
        self.norm_pix_loss = config.norm_pix_loss
        self.encoder = ViT(image_size, config.encoder)
        self.grid = self.encoder.grid
        self.embed = nn.Linear(config.encoder.embed_dim, dim)
        self.decoder = Decoder(self.grid, config.decoder, cls_token=True)
        self.aggregation = build_aggregation(partial or PartialConfig(), throwing, self.grid, dim)
        self.head = PixelHead(dim, self.patch_size)
        self.embed.apply(init_mae)

    def blocks(self) -> list[nn.Module]:
        return [*self.encoder.blocks, *self.decoder.blocks]

    def forward(self, images: Tensor, plan: MaskPlan) -> MIMOutput:
        self.check_inputs(images, plan)
        latent = self.encoder(images, plan)  # (B, 1 + V, D)
        visible, kept = self.decoder(self.embed(latent), plan)  # (B, V, d), (B, K, d)
        tokens, ids = self.aggregation(visible, kept, plan, self.head.norm)  # (B, n, d), (B, n)
        pixels = self.head.pred(tokens)  # (B, n, p * p * 3)
        target = pixel_targets(images, ids, self.patch_size, self.norm_pix_loss)
        return MIMOutput(mean_squared_error(pixels, target), pixels, ids, self.grid[0] * self.grid[1])
