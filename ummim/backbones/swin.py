"""Swin encoder on a compact grid: the visible patch of every 2x2 block, as if the image were half as wide.

Source: UM-MAE, sections 3.1 and 3.2. Since neighbours on the compact grid are not neighbours in the image, the
relative position bias is a small MLP of the *true* coordinate differences.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from ummim.backbones.pyramid import Hiding, PatchMerge, Pyramid
from ummim.backbones.window import Geometry, attend, merge_windows, partition, window_geometry
from ummim.masking import MaskPlan
from ummim.nn.layers import LayerNorm, init_mae


@dataclass(frozen=True)
class SwinConfig:
    """A Swin's size; the default is Swin-T.

    Attributes:
        kind: names this encoder in a recipe.
        embed_dim: width of the first stage; it doubles at each of the three merges.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window_size: side of an attention window, in tokens; a smaller grid becomes one window.
        mlp_ratio: hidden width of the MLP, in widths.
        pos_mlp_dim: hidden width of the relative position MLP.
    """

    kind: Literal["um_swin"] = field(default="um_swin", kw_only=True)
    embed_dim: int = 96
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    num_heads: tuple[int, int, int, int] = (3, 6, 12, 24)
    window_size: int = 8
    mlp_ratio: float = 4.0
    pos_mlp_dim: int = 32


class WindowAttention(nn.Module):
    """Multi-head attention in windows, biased by an MLP of the signed log of coordinate differences."""

    def __init__(self, dim: int, num_heads: int, pos_mlp_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.posmlp = nn.Sequential(nn.Linear(2, pos_mlp_dim), nn.ReLU(), nn.Linear(pos_mlp_dim, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def bias(self, differences: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
        """(L, 2), (1 or B, 1 or nW, n, n), (nW, n, n) -> (1 or B, 1 or nW, heads, n, n).

        Distinct differences are few, so the MLP runs once on each and the pairs look their value up.
        """
        dtype = self.qkv.weight.dtype
        differences = differences.to(torch.promote_types(dtype, differences.dtype))
        signed_log = differences.sign() * differences.abs().log1p()
        table = self.posmlp(signed_log.to(dtype))  # (L, heads)
        bias = F.embedding(index, table).permute(0, 1, 4, 2, 3).contiguous()  # fused kernels need its last stride 1
        return bias if mask is None else bias + mask[:, None].to(bias.dtype)

    def forward(self, x: Tensor, differences: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
        """(B, nW, n, C) -> (B, nW, n, C)."""
        return self.proj(attend(self.qkv(x), self.num_heads, self.bias(differences, index, mask)))


class SwinBlock(nn.Module):
    """Pre-norm window attention and MLP on a (B, H, W, C) map."""

    def __init__(self, dim: int, num_heads: int, config: SwinConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)  # eps 1e-5 in the official blocks, unlike all other norms of the model
        self.attn = WindowAttention(dim, num_heads, config.pos_mlp_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))

    def forward(self, x: Tensor, differences: Tensor, index: Tensor, mask: Tensor | None, shift: int) -> Tensor:
        """(B, H, W, C) -> the same; windows are those of the map rolled by ``shift`` up and left."""
        _, h, w, _ = x.shape
        window = int(index.shape[-1] ** 0.5)
        y = self.norm1(x)
        y = torch.roll(y, (-shift, -shift), (1, 2)) if shift else y
        y = merge_windows(self.attn(partition(y, window), differences, index, mask), window, h, w)
        y = torch.roll(y, (shift, shift), (1, 2)) if shift else y
        x = x + y
        return x + self.mlp(self.norm2(x))


class Stage(nn.Module):
    """An optional merge, then blocks that alternate plain and shifted windows."""

    def __init__(self, dim: int, depth: int, num_heads: int, merge: bool, config: SwinConfig) -> None:
        super().__init__()
        self.merge = PatchMerge(dim // 2, dim, norm=True) if merge else None
        self.blocks = nn.ModuleList(SwinBlock(dim, num_heads, config) for _ in range(depth))

    def forward(self, x: Tensor, plain: Geometry, shifted: Geometry) -> Tensor:
        x = x if self.merge is None else self.merge(x)
        for i, block in enumerate(self.blocks):
            g = shifted if i % 2 else plain
            x = block(x, g.differences, g.index, g.mask, g.shift)
        return x


class Swin(Pyramid):
    """Swin with position MLPs.

    Args:
        image_size: side of the image.
        config: sizes.
        hiding: how masked patches are hidden.
        secondary: ``compact`` has a ``vis_mask_token``.
        final_norm: end in a LayerNorm.
    """

    def __init__(
        self,
        image_size: int,
        config: SwinConfig,
        hiding: Hiding = "compact",
        secondary: bool = True,
        final_norm: bool = True,
    ) -> None:
        super().__init__(image_size, config.embed_dim, norm=True, hiding=hiding, secondary=secondary)
        self.config = config
        self.stages = nn.ModuleList(
            Stage(config.embed_dim * 2**s, config.depths[s], config.num_heads[s], s > 0, config) for s in range(4)
        )
        self.embed_dim = config.embed_dim * 8
        self.norm = LayerNorm(self.embed_dim) if final_norm else nn.Identity()
        self.apply(init_mae)
        for module in self.modules():
            if isinstance(module, WindowAttention):
                _init_position_mlp(module.posmlp)

    def forward(self, images: Tensor, plan: MaskPlan | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, 8C): the last stage's normed map; compact under a plan to be compacted.

        Raises:
            ValueError: a plan that is not uniform, where the grid is to be compacted.
        """
        compact = self.compacts(plan)
        x, rows, cols = self.embed(images, plan)
        for s, stage in enumerate(self.stages):
            if s:
                rows, cols = rows[:, ::2, ::2], cols[:, ::2, ::2]  # a merged token keeps its top-left coordinate
            window = self.config.window_size
            plain = shifted = window_geometry(rows, cols, window, shifted=False, stage=s, compact=compact)
            if window < rows.shape[1]:  # else there is one window, and nothing to shift
                shifted = window_geometry(rows, cols, window, shifted=True, stage=s, compact=compact)
            x = stage(x, plain, shifted)
        return self.norm(x)


def _init_position_mlp(mlp: nn.Sequential) -> None:
    """The official position MLP is two 1x1 convolutions, with a convolution's initialisation."""
    for layer in (mlp[0], mlp[2]):
        assert isinstance(layer, nn.Linear)
        nn.init.normal_(layer.weight, std=(2.0 / layer.out_features) ** 0.5)
        nn.init.zeros_(layer.bias)
