"""The light Transformer decoder of MAE and its kin, and its prediction head."""

from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from ummim.masking import MaskPlan
from ummim.nn.layers import LayerNorm, init_mae, sincos_table


@dataclass(frozen=True)
class DecoderConfig:
    """The decoder's size.

    Attributes:
        embed_dim: width.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP, in widths.
    """

    embed_dim: int = 512
    depth: int = 8
    num_heads: int = 16
    mlp_ratio: float = 4.0


class Decoder(nn.Module):
    """[class token,] visible tokens and kept mask tokens -> blocks -> the same tokens, before the final norm.

    Thrown tokens (PR-MIM) never enter. Source: MAE, section 3; the order of the sequence does not matter, so
    visible and kept tokens are concatenated instead of being shuffled back to the grid.
    """

    pos_embed: Tensor

    def __init__(self, grid: tuple[int, int], config: DecoderConfig, cls_token: bool) -> None:
        super().__init__()
        dim = config.embed_dim
        self.prefix = int(cls_token)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("pos_embed", sincos_table(dim, grid, cls_token))  # (1, [1 +] N, D)
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, config.mlp_ratio, qkv_bias=True, norm_layer=LayerNorm)
            for _ in range(config.depth)
        )
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(init_mae)

    def position(self, ids: Tensor) -> Tensor:
        """(B, n) -> (B, n, D): position embedding of grid tokens, in the weights' dtype."""
        return F.embedding(ids + self.prefix, self.pos_embed[0]).to(self.mask_token.dtype)

    def forward(self, latent: Tensor, plan: MaskPlan, visible_at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            latent: (B, [1 +] V, D) embedded encoder output, visible tokens in the plan's order.
            plan: the mask plan.
            visible_at: (B, V) positions of the visible tokens, where they are not ``plan.visible``.

        Returns:
            (B, V, D) visible and (B, K, D) kept tokens.
        """
        at = self.position(plan.visible if visible_at is None else visible_at)
        if self.prefix:
            at = torch.cat([self.pos_embed[:, :1].to(at.dtype).expand(at.shape[0], -1, -1), at], dim=1)
        kept = self.mask_token + self.position(plan.kept)  # (B, K, D)
        x = torch.cat([latent + at, kept], dim=1)  # (B, [1 +] V + K, D)
        for block in self.blocks:
            x = block(x)
        _, visible, kept = x.split([self.prefix, plan.visible.shape[1], plan.kept.shape[1]], dim=1)
        return visible, kept


class PixelHead(nn.Module):
    """Final norm and linear prediction of a patch's pixels: (B, n, D) -> (B, n, p * p * 3).

    A method with an aggregation applies the two apart: the norm is part of the aggregation's step.
    """

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.pred = nn.Linear(dim, patch**2 * 3)
        self.apply(init_mae)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.pred(self.norm(tokens))
