"""Stochastic depth ("Deep Networks with Stochastic Depth", Huang et al., 2016) for blocks of every kind of encoder."""

from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn

from ummim.backbones.pvt import PVTBlock
from ummim.backbones.swin import SwinBlock


class DroppedLinear(nn.Linear):
    """The last layer of a residual branch: its output is skipped at random, sample by sample; keys are Linear's.

    Args:
        layer: whose weights it takes over.
        chance: that a sample's output is zero while training.
    """

    def __init__(self, layer: nn.Linear, chance: float) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.drop_path = DropPath(chance)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., in) -> (B, ..., out)."""
        return self.drop_path(super().forward(x))


def set_drop_path(blocks: Sequence[nn.Module], rate: float) -> None:
    """Let the branches of block i of n be skipped for a sample with chance ``rate * i / (n - 1)``."""
    for i, block in enumerate(blocks):
        chance = rate * i / max(1, len(blocks) - 1)
        own: Any = block
        if isinstance(block, SwinBlock | PVTBlock):  # these have no place of their own for it
            own.attn.proj = DroppedLinear(own.attn.proj, chance)
            own.mlp.drop2 = DropPath(chance)
        else:
            own.drop_path1 = DropPath(chance) if chance else nn.Identity()
            own.drop_path2 = DropPath(chance) if chance else nn.Identity()
