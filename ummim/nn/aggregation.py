"""Partial reconstruction (PR-MIM): which tokens a method predicts, and how thrown ones are filled in.

A method calls ``aggregation(visible, kept, plan)`` between its decoder and its head and gets the tokens to
predict together with their ids; it never asks whether tokens were thrown.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ummim.masking import MaskPlan
from ummim.nn.layers import take


@dataclass(frozen=True)
class PartialConfig:
    """Partial reconstruction, in force when the throwing ratio is above 0.

    Attributes:
        aggregation: ``conv`` fills thrown tokens by a depth-wise convolution (PR-MIM's progressive
            reconstruction); ``none`` leaves them in no loss (plain partial reconstruction, the baseline).
        kernel_size: side of the depth-wise convolution, odd; the paper's best is 7.
    """

    aggregation: Literal["conv", "none"] = "conv"
    kernel_size: int = 7


class KeptOnly(nn.Module):
    """Predict the kept tokens: all masked ones in full reconstruction, part of them in the plain baseline."""

    def forward(self, visible: Tensor, kept: Tensor, plan: MaskPlan) -> tuple[Tensor, Tensor]:
        return kept, plan.kept


class SpatialAggregation(nn.Module):
    """Lay the decoded tokens on the grid, zeros at thrown ones, and convolve depth-wise to fill those in.

    Kept tokens pass unchanged, so at throwing ratio 0 the method's loss is that of full reconstruction.
    Source: PR-MIM, progressive reconstruction.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, visible: Tensor, kept: Tensor, plan: MaskPlan) -> tuple[Tensor, Tensor]:
        """(B, V, D), (B, K, D) -> tokens (B, K + T, D) of all masked positions and their ids (B, K + T)."""
        h, w = plan.grid
        b, _, d = kept.shape
        grid = kept.new_zeros(b, h * w, d)
        grid = grid.scatter(1, plan.visible[:, :, None].expand(-1, -1, d), visible)
        grid = grid.scatter(1, plan.kept[:, :, None].expand(-1, -1, d), kept)
        grid = grid.view(b, h, w, d).permute(0, 3, 1, 2)  # (B, D, h, w), channels last in memory
        filled = self.dwconv(grid).permute(0, 2, 3, 1).reshape(b, h * w, d)
        return torch.cat([kept, take(filled, plan.thrown)], dim=1), plan.masked


def build_aggregation(config: PartialConfig, throwing: bool, dim: int) -> nn.Module:
    """The module between decoder and head; nothing is added to the method when no token is thrown."""
    if throwing and config.aggregation == "conv":
        return SpatialAggregation(dim, config.kernel_size)
    return KeptOnly()
