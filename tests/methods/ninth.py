"""PixMIM, as a user would add it: MAE that regresses the low frequencies of the image.

Source: "PixMIM: Rethinking Pixel Reconstruction in Masked Image Modeling", section 4: an ideal low-pass filter on the
target. docs/methods.md shows this file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ummim.backbones.vit import ViT
from ummim.masking import MaskPlan
from ummim.methods import mae
from ummim.methods.api import Method, MIMOutput
from ummim.nn.aggregation import PartialConfig, build_aggregation
from ummim.nn.decoder import Decoder, PixelHead
from ummim.nn.targets import mean_squared_error, pixel_targets


@dataclass(frozen=True)
class Config(mae.Config):
    """MAE's config and the filter's radius, in cycles per image."""

    radius: float = 40.0

    def build(self, image_size: int, partial: PartialConfig, throwing: bool) -> "PixMIM":
        return PixMIM(image_size, self, partial, throwing)


class PixMIM(Method):
    encoder: ViT

    def __init__(self, image_size: int, config: Config, partial: PartialConfig, throwing: bool) -> None:
        super().__init__()
        self.patch_size, self.radius = config.encoder.patch_size, config.radius
        self.norm_pix_loss = config.norm_pix_loss
        self.encoder = ViT(image_size, config.encoder)
        self.grid = self.encoder.grid
        self.embed = nn.Linear(config.encoder.embed_dim, config.decoder.embed_dim)
        self.decoder = Decoder(self.grid, config.decoder, cls_token=True)
        self.aggregation = build_aggregation(partial, throwing, self.grid, config.decoder.embed_dim)
        self.head = PixelHead(config.decoder.embed_dim, self.patch_size)

    def blocks(self) -> list[nn.Module]:
        return [*self.encoder.blocks, *self.decoder.blocks]

    def low_pass(self, images: Tensor) -> Tensor:
        at = torch.fft.fftfreq(images.shape[-1], 1 / images.shape[-1], device=images.device)  # (H,); images are square
        near = at[:, None].square() + at.square() <= self.radius**2  # (H, W)
        return torch.fft.ifft2(torch.fft.fft2(images) * near).real

    def forward(self, images: Tensor, plan: MaskPlan) -> MIMOutput:
        self.check_inputs(images, plan)
        visible, kept = self.decoder(self.embed(self.encoder(images, plan)), plan)  # (B, V, d), (B, K, d)
        tokens, ids = self.aggregation(visible, kept, plan, self.head.norm)  # (B, n, d), (B, n)
        pixels = self.head.pred(tokens)  # (B, n, p * p * 3)
        target = pixel_targets(self.low_pass(images), ids, self.patch_size, self.norm_pix_loss)
        return MIMOutput(mean_squared_error(pixels, target), pixels, ids, self.grid[0] * self.grid[1])
