"""Pyramid Vision Transformer: global attention with pooled keys and values, on a compact grid under UM-MAE.

Source: "Pyramid Vision Transformer" (Wang et al., ICCV 2021) in the variant of UM-MAE's official code: keys and values
are average-pooled, then mixed by a 1x1 convolution; merges are 2x2 convolutions; positions are a fixed table.
"""

from dataclasses import dataclass, field
from typing import Literal

from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from ummim.backbones.pyramid import MASK_PATCH, TOKEN, Hiding, PatchMerge, Pyramid
from ummim.masking import MaskPlan
from ummim.nn.layers import LayerNorm, init_mae, sincos_table


@dataclass(frozen=True)
class PVTConfig:
    """A PVT's size; the default is PVT-S on the compact grid.

    Attributes:
        kind: names this encoder in a recipe.
        embed_dims: width of each stage.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        mlp_ratios: hidden width of each stage's MLP, in widths.
        sr_ratios: side of the squares over which each stage pools keys and values. 4, 2, 1, 1 on a compact grid;
            8, 4, 2, 1 on a whole one (fine-tuning, SimMIM).
    """

    kind: Literal["pvt"] = field(default="pvt", kw_only=True)
    embed_dims: tuple[int, int, int, int] = (64, 128, 320, 512)
    depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    num_heads: tuple[int, int, int, int] = (1, 2, 5, 8)
    mlp_ratios: tuple[float, float, float, float] = (8.0, 8.0, 4.0, 4.0)
    sr_ratios: tuple[int, int, int, int] = (4, 2, 1, 1)


class PooledAttention(nn.Module):
    """Multi-head attention of every token to squares of tokens: pooled, mixed linearly and normed."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Linear(dim, dim)  # a 1x1 convolution in the official code, there also where nothing is pooled
        self.norm = nn.LayerNorm(dim)  # eps 1e-5

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        b, h, w, c = x.shape
        s = self.sr_ratio
        q = self.q(x).view(b, h * w, self.num_heads, -1).transpose(1, 2)  # (B, heads, HW, C / heads)
        x = x.view(b, h // s, s, w // s, s, c).mean((2, 4)) if s > 1 else x  # (B, H / s, W / s, C)
        x = self.norm(self.sr(x))
        k, v = self.kv(x).view(b, -1, 2, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, HW, C / heads)
        return self.proj(x.transpose(1, 2).reshape(b, h, w, c))


class PVTBlock(nn.Module):
    """Pre-norm pooled attention and MLP on a (B, H, W, C) map."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, sr_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)  # eps 1e-5 in the official blocks, as in their attention
        self.attn = PooledAttention(dim, num_heads, sr_ratio)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Stage(nn.Module):
    """An optional merge, then blocks."""

    def __init__(self, stage: int, config: PVTConfig) -> None:
        super().__init__()
        dims = config.embed_dims
        self.merge = PatchMerge(dims[stage - 1], dims[stage], norm=False) if stage else None
        self.blocks = nn.ModuleList(
            PVTBlock(dims[stage], config.num_heads[stage], config.mlp_ratios[stage], config.sr_ratios[stage])
            for _ in range(config.depths[stage])
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.merge is None else self.merge(x)
        for block in self.blocks:
            x = block(x)
        return x


class PVT(Pyramid):
    """PVT with a fixed sine-cosine position table, in which every token has the row of its true place.

    Args:
        image_size: side of the image.
        config: sizes.
        hiding: how masked patches are hidden; the table is added after that, to hidden tokens as well.
        secondary: ``compact`` has a ``vis_mask_token``.
        final_norm: end in a LayerNorm.
    """

    pos_embed: Tensor

    def __init__(
        self,
        image_size: int,
        config: PVTConfig,
        hiding: Hiding = "compact",
        secondary: bool = True,
        final_norm: bool = True,
    ) -> None:
        super().__init__(image_size, config.embed_dims[0], norm=False, hiding=hiding, secondary=secondary)
        self.config = config
        h, w = (side * MASK_PATCH // TOKEN for side in self.grid)
        self.register_buffer("pos_embed", sincos_table(config.embed_dims[0], (h, w)))  # (1, H/4 * W/4, C)
        self.stages = nn.ModuleList(Stage(s, config) for s in range(4))
        self.embed_dim = config.embed_dims[3]
        self.norm = LayerNorm(self.embed_dim) if final_norm else nn.Identity()
        self.apply(init_mae)
        for module in self.modules():
            if isinstance(module, PooledAttention):  # initialised as the convolution that it officially is
                nn.init.normal_(module.sr.weight, std=(2.0 / module.sr.out_features) ** 0.5)

    def forward(self, images: Tensor, plan: MaskPlan | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, C): the last stage's normed map; compact under a plan to be compacted.

        Raises:
            ValueError: a plan that is not uniform, where the grid is to be compacted.
        """
        x, rows, cols = self.embed(images, plan)  # (B, H', W', C), (B', H', W')
        ids = rows * (self.grid[1] * MASK_PATCH // TOKEN) + cols
        x = x + F.embedding(ids, self.pos_embed[0]).to(x.dtype)  # the table stays float32 in a 16-bit model
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)
