"""Vision Transformer encoder that sees visible tokens only (MAE, section 3)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from ummim.masking import MaskPlan
from ummim.nn.layers import LayerNorm, PatchConv, every_token, init_mae, sincos_table, take_patches


@dataclass(frozen=True)
class ViTConfig:
    """A ViT's size; the default is ViT-B/16.

    Attributes:
        kind: names this encoder in a recipe.
        patch_size: side of a patch, in pixels.
        embed_dim: width.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP, in widths.
    """

    kind: Literal["vit"] = field(default="vit", kw_only=True)
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0


class PatchEmbed(nn.Module):
    """Patches -> tokens: (B, n, 3, p, p) -> (B, n, D)."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = PatchConv(patch, dim)

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches.flatten(2))


class ViT(nn.Module):
    """ViT with a class token and a fixed sine-cosine position table; parameter names are timm's.

    Args:
        image_size: side of the images, in pixels.
        config: the sizes.
        secondary: add UM-MAE's ``vis_mask_token``, which replaces the visible tokens that the plan marks; they
            keep their position embedding.
        final_norm: end with a LayerNorm; without it ``norm`` is the identity.
    """

    pos_embed: Tensor

    def __init__(self, image_size: int, config: ViTConfig, secondary: bool = False, final_norm: bool = True) -> None:
        super().__init__()
        side, dim = image_size // config.patch_size, config.embed_dim
        self.config = config
        self.grid = (side, side)
        self.embed_dim = dim
        self.patch_embed = PatchEmbed(config.patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.vis_mask_token = nn.Parameter(torch.zeros(1, 1, dim)) if secondary else None
        self.register_buffer("pos_embed", sincos_table(dim, self.grid, cls_token=True))  # (1, 1 + N, D)
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, config.mlp_ratio, qkv_bias=True, norm_layer=LayerNorm)
            for _ in range(config.depth)
        )
        self.norm = LayerNorm(dim) if final_norm else nn.Identity()
        nn.init.normal_(self.cls_token, std=0.02)
        if self.vis_mask_token is not None:
            nn.init.normal_(self.vis_mask_token, std=0.02)
        self.apply(init_mae)

    def class_token(self) -> Tensor:
        """(1, 1, D): what stands first in the sequence, before its position embedding."""
        return self.cls_token

    def embed(self, images: Tensor, plan: MaskPlan | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + V, D): class token, then visible tokens in the plan's order (all without one)."""
        b = images.shape[0]
        ids = every_token(b, self.grid[0] * self.grid[1], images.device) if plan is None else plan.visible
        x = self.patch_embed(take_patches(images, ids, self.config.patch_size))  # (B, V, D)
        if plan is not None and self.vis_mask_token is not None:
            x = torch.where(plan.secondary[:, :, None], self.vis_mask_token, x)
        x = x + F.embedding(ids + 1, self.pos_embed[0]).to(x.dtype)  # the table stays float32 in a 16-bit model
        cls = (self.class_token() + self.pos_embed[:, :1].to(x.dtype)).expand(b, -1, -1)  # (B, 1, D)
        return torch.cat([cls, x], dim=1)  # (B, 1 + V, D)

    def features(self, images: Tensor, plan: MaskPlan | None, taps: Sequence[int]) -> list[Tensor]:
        """The outputs (B, 1 + V, D) of the blocks with indices ``taps`` (from 0, ascending), before any norm."""
        x = self.embed(images, plan)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in taps:
                outputs.append(x)
        return outputs

    def forward(self, images: Tensor, plan: MaskPlan | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + V, D), normed."""
        return self.norm(self.features(images, plan, [len(self.blocks) - 1])[0])
