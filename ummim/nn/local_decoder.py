"""LocalMIM's decoders: one light decoder for each scale, with a head that predicts cells of that scale's size.

Source: "Masked Image Modeling with Local Multi-Scale Reconstruction" (LocalMIM), section 3.3, and its official code.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ummim.masking import MaskPlan
from ummim.nn.aggregation import PartialConfig, build_aggregation
from ummim.nn.decoder import Decoder, DecoderConfig
from ummim.nn.layers import LayerNorm, finer_cells, init_mae


class LocalPrediction(NamedTuple):
    """What a decoder predicts, on its scale's grid of cells."""

    values: Tensor  # (B, m, F)
    cells: Tensor  # (B, m) int64: the cells that ``values`` belong to, row-major
    weight: Tensor | None  # (B, m): how far each cell is masked, in [0, 1]; None: all are, wholly


class TokenDeconv(nn.ConvTranspose2d):
    """A 2x2 transposed convolution of stride 2, on single tokens: each becomes 2x2 finer ones, no other has part.

    Its keys, shapes and initialisation are a transposed convolution's.
    """

    bias: nn.Parameter

    def __init__(self, dim: int, out: int) -> None:
        super().__init__(dim, out, 2, stride=2)

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        """(..., C) -> (..., 2, 2, C')."""
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (2 * 2 * C', C)
        return F.linear(tokens, weight, self.bias.repeat(4)).unflatten(-1, (2, 2, -1))


class FineHead(nn.Module):
    """Each normed token's cells: 1, 2x2 or 4x4 of them, for masked tokens only.

    Args:
        grid: (h, w) of the tokens.
        dim: width of the tokens.
        out: numbers predicted for a cell.
        doublings: 0, 1 or 2; a token's side is 2**doublings cells.
    """

    def __init__(self, grid: tuple[int, int], dim: int, out: int, doublings: int) -> None:
        super().__init__()
        self.width, self.doublings = grid[1], doublings
        self.norm = LayerNorm(dim)
        layers: list[list[nn.Module]] = [
            [nn.Linear(dim, out)],
            [TokenDeconv(dim, dim // 2), nn.Linear(dim // 2, out)],
            [
                TokenDeconv(dim, dim // 2),
                LayerNorm(dim // 2),
                nn.GELU(),
                TokenDeconv(dim // 2, dim // 4),
                nn.Linear(dim // 4, out),
            ],
        ]
        self.pred = nn.Sequential(*layers[doublings])

    def forward(self, visible: Tensor, tokens: Tensor, ids: Tensor, plan: MaskPlan) -> LocalPrediction:
        """Visible tokens (B, V, D), normed masked ones (B, n, D), their ids (B, n) -> their n * 4**doublings cells."""
        x = self.pred(tokens)  # (B, n, [2, 2,] [2, 2,] F)
        x = x.transpose(3, 4) if self.doublings == 2 else x  # (B, n, rows 2, 2, columns 2, 2, F)
        return LocalPrediction(x.flatten(1, -2), finer_cells(ids, self.width, 2**self.doublings), None)


class CoarseHead(nn.Module):
    """The mean of every 2x2 normed tokens, visible ones included, and its prediction.

    A cell counts in the loss as far as it is masked: 1/4 for each predicted token.
    """

    def __init__(self, grid: tuple[int, int], dim: int, out: int) -> None:
        super().__init__()
        self.grid = grid
        self.norm = LayerNorm(dim)
        self.pred = nn.Linear(dim, out)

    def forward(self, visible: Tensor, tokens: Tensor, ids: Tensor, plan: MaskPlan) -> LocalPrediction:
        """Visible tokens (B, V, D), normed masked ones (B, n, D), their ids (B, n) -> all h / 2 * w / 2 cells."""
        x = torch.cat([self.norm(visible), tokens], dim=1)  # (B, V + n, D)
        b, _, d = x.shape
        at = torch.cat([plan.visible, ids], dim=1)  # (B, V + n)
        h, w = self.grid
        grid = x.new_zeros(b, h * w, d).scatter(1, at[:, :, None].expand(-1, -1, d), x)
        weight = _pooled(ids.new_zeros(b, h * w, 1, dtype=torch.float32).scatter(1, ids[:, :, None], 1.0), self.grid)
        # Tokens that nobody predicted (thrown, without an aggregation) are no part of a mean. The others are.
        present = _pooled(ids.new_zeros(b, h * w, 1, dtype=torch.float32).scatter(1, at[:, :, None], 1.0), self.grid)
        mean = _pooled(grid, self.grid) / present.clamp(min=0.25).to(x.dtype)  # (B, h/2 * w/2, D)
        cells = torch.arange(h * w // 4, device=ids.device).expand(b, -1)
        return LocalPrediction(self.pred(mean), cells, weight[:, :, 0])


class LocalDecoder(nn.Module):
    """Embed, light decoder, [aggregation,] head: the tokens of one scale -> a prediction for its masked cells.

    Args:
        grid: (h, w) of the tokens.
        encoder_dim: width of the encoder's tokens at this scale.
        config: the decoder's size.
        head: :class:`FineHead` or :class:`CoarseHead`.
        cls_token: the first encoder token is a class token; it is decoded along, and dropped.
        partial: how thrown tokens are filled in.
        throwing: whether plans will hold thrown tokens.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        encoder_dim: int,
        config: DecoderConfig,
        head: FineHead | CoarseHead,
        cls_token: bool,
        partial: PartialConfig,
        throwing: bool,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_dim, config.embed_dim)
        self.decoder = Decoder(grid, config, cls_token)
        self.aggregation = build_aggregation(partial, throwing, grid, config.embed_dim)
        self.head = head
        self.embed.apply(init_mae)

    def forward(self, latent: Tensor, plan: MaskPlan) -> LocalPrediction:
        """(B, [1 +] V, D), visible tokens in the plan's order, and a plan on this scale's grid."""
        visible, kept = self.decoder(self.embed(latent), plan)  # (B, V, d), (B, K, d)
        tokens, ids = self.aggregation(visible, kept, plan, self.head.norm)  # (B, n, d), (B, n)
        return self.head(visible, tokens, ids, plan)


def _pooled(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h * w, C) -> (B, h/2 * w/2, C): the mean of every 2x2."""
    b, _, c = tokens.shape
    return tokens.view(b, grid[0] // 2, 2, grid[1] // 2, 2, c).mean((2, 4)).flatten(1, 2)
