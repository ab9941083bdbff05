"""Partial reconstruction (PR-MIM): which tokens a method predicts, and how thrown ones are filled in.

A method calls ``aggregation(visible, kept, plan, norm)`` with its decoder's output and its head's norm, and gets the
normed tokens to predict together with their ids. MAE, MFF, UM-MAE, GreenMIM and LocalMIM need no more than that; on
SimMIM thrown tokens leave the encoder, and TEC decodes twice.

Source: "PR-MIM: Delving Deeper into Partial Reconstruction in Masked Image Modeling" (arXiv 2411.15746), progressive
reconstruction. There is no public code; where the paper is silent, docs/pr_mim.md says what was chosen and why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Literal

import torch
from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ummim.masking import MaskPlan
from ummim.nn.layers import LayerNorm, init_mae, sincos_table, take

Norm = Callable[[Tensor], Tensor]
BLOCKS = ("transformer", "convnext")  # aggregations that are a whole block, with a residual branch


@dataclass(frozen=True)
class PartialConfig:
    """Partial reconstruction, in force when the throwing ratio is above 0.

    Attributes:
        aggregation: what fills thrown tokens in: ``conv``, a depth-wise convolution (PR-MIM's progressive
            reconstruction), or what the paper compares it with: ``pool``, the average of the square around,
            ``transformer`` and ``convnext``, a whole block of either. ``none`` leaves thrown tokens in no loss:
            plain partial reconstruction, the paper's baseline.
        kernel_size: side of convolution or square, odd; the paper's best is 7.
        bias: the depth-wise convolution has one.
        fill: which tokens take the aggregation's output: the ``thrown`` ones, while kept ones pass unchanged;
            ``all`` masked ones; or all as a ``residual``, output plus token (``conv`` and ``pool``).
        after_norm: aggregate tokens that have passed the head's norm, instead of before.
    """

    aggregation: Literal["conv", "pool", "transformer", "convnext", "none"] = "conv"
    kernel_size: int = 7
    bias: bool = True
    fill: Literal["thrown", "all", "residual"] = "thrown"
    after_norm: bool = False


class KeptOnly(nn.Module):
    """Predict the kept tokens: all masked ones in full reconstruction, part of them in the plain baseline."""

    def forward(self, visible: Tensor, kept: Tensor, plan: MaskPlan, norm: Norm) -> tuple[Tensor, Tensor]:
        return norm(kept), plan.kept


class SpatialAggregation(nn.Module):
    """Lay the decoded tokens on the grid, zeros at thrown ones, and fill those in from around.

    By default kept tokens pass unchanged, so at throwing ratio 0 the method's loss is that of full reconstruction.

    Args:
        config: how.
        grid: (h, w) of the tokens.
        dim: their width.
    """

    def __init__(self, config: PartialConfig, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.config = config
        self.layer = _build_layer(config, grid, dim)

    def forward(self, visible: Tensor, kept: Tensor, plan: MaskPlan, norm: Norm) -> tuple[Tensor, Tensor]:
        """(B, V, D), (B, K, D) -> normed tokens (B, K + T, D) of all masked positions and their ids (B, K + T)."""
        if self.config.after_norm:
            return self.aggregate(norm(visible), norm(kept), plan), plan.masked
        return norm(self.aggregate(visible, kept, plan)), plan.masked

    def aggregate(self, visible: Tensor, kept: Tensor, plan: MaskPlan) -> Tensor:
        """(B, V, D), (B, K, D) -> (B, K + T, D)."""
        h, w = plan.grid
        b, _, d = kept.shape
        decoded, ids = torch.cat([visible, kept], dim=1), torch.cat([plan.visible, plan.kept], dim=1)
        tokens = kept.new_zeros(b, h * w, d).scatter(1, ids[:, :, None].expand(-1, -1, d), decoded)
        output = self.layer(tokens.view(b, h, w, d).permute(0, 3, 1, 2))  # (B, D, h, w), channels last in memory
        output = output.permute(0, 2, 3, 1).reshape(b, h * w, d)
        if self.config.fill == "thrown":
            return torch.cat([kept, take(output, plan.thrown)], dim=1)
        if self.config.fill == "residual":
            output = output + tokens
        return take(output, plan.masked)


class GridTransformer(nn.Module):
    """One Transformer block on the whole grid: (B, D, h, w) -> (B, D, h, w).

    Thrown tokens come as zeros, so they would all get the same output: the block adds a position table first.
    """

    pos_embed: Tensor

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        heads = gcd(dim, max(1, dim // 32))  # 32 channels a head, as in MAE's decoder, where that divides the width
        self.block = Block(dim, heads, qkv_bias=True, norm_layer=LayerNorm)
        self.register_buffer("pos_embed", sincos_table(dim, grid), persistent=False)  # (1, N, D)
        self.apply(init_mae)

    def forward(self, grid: Tensor) -> Tensor:
        tokens = grid.flatten(2).transpose(1, 2)  # (B, N, D)
        tokens = self.block(tokens + self.pos_embed.to(tokens.dtype))
        return tokens.transpose(1, 2).unflatten(2, grid.shape[2:])


def build_aggregation(config: PartialConfig, throwing: bool, grid: tuple[int, int], dim: int) -> nn.Module:
    """The module between decoder and head; nothing is added to the method when no token is thrown.

    Args:
        config: the recipe's ``partial`` section.
        throwing: whether plans will hold thrown tokens.
        grid: (h, w) of the decoded tokens.
        dim: their width; for the Transformer block a multiple of 4.
    """
    if throwing and config.aggregation != "none":
        return SpatialAggregation(config, grid, dim)
    return KeptOnly()


def _build_layer(config: PartialConfig, grid: tuple[int, int], dim: int) -> nn.Module:
    """A module (B, D, h, w) -> (B, D, h, w) that treats every channel of a token's surroundings."""
    size = config.kernel_size
    if config.aggregation == "conv":
        return nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim, bias=config.bias)
    if config.aggregation == "pool":
        return nn.AvgPool2d(size, stride=1, padding=size // 2)
    if config.aggregation == "convnext":
        return ConvNeXtBlock(dim, kernel_size=size, ls_init_value=None)
    return GridTransformer(grid, dim)
