"""SimMIM's Vision Transformer: one relative position table for all blocks, LayerScale; absolute positions if asked.

Source: SimMIM, section 4.1, whose ViT is BEiT's ("BEiT: BERT Pre-Training of Image Transformers", section 2.4).
Parameter names are timm's ``beit`` models'.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from ummim.backbones.vit import PatchEmbed
from ummim.masking import MaskPlan
from ummim.nn.attention import biased_attention
from ummim.nn.layers import LayerNorm, every_token, exact, take, take_patches

ROW_UNIT = 8  # elements: PyTorch copies a bias for its memory-efficient attention unless rows are aligned to this


@dataclass(frozen=True)
class RelativeViTConfig:
    """A relative ViT's size; the default is SimMIM's ViT-B/16.

    Attributes:
        kind: names this encoder in a recipe.
        patch_size: side of a patch, in pixels.
        embed_dim: width.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP, in widths.
        layer_scale: what the factors on every branch's channels start from.
        drop_path: chance that the last block's branches are skipped for a sample; it grows linearly from 0.
        relative_position: add the relative position bias. AMT's SimMIM has none.
        absolute_position: add a learned position embedding to the tokens. AMT's SimMIM has it, SimMIM's has none.
    """

    kind: Literal["relative_vit"] = field(default="relative_vit", kw_only=True)
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    layer_scale: float = 0.1
    drop_path: float = 0.1
    relative_position: bool = True
    absolute_position: bool = False


class RelativePositionBias(nn.Module):
    """A learned bias of every head for each (row, column) offset of a query from a key, and three for the class token.

    The table has a row per offset, then one each for class token to patch, patch to class token and class token to
    itself (query first); it starts from zeros.
    """

    def __init__(self, grid: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        self.grid = grid
        rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, n) grid ids -> (B, heads, 1 + n, 1 + n): for sequences of a class token and the tokens at ``ids``.

        Its rows lie ``ROW_UNIT`` elements apart or a multiple of that, and it is cast once, so that all blocks' kernels
        take this very tensor; else each would keep a copy for its backward pass.
        """
        index = relative_index(ids, self.grid)
        keys = index.shape[2]
        index = F.pad(index, (0, -keys % ROW_UNIT))  # (B, 1 + n, m): the columns beyond are cut off below
        table = exact(self.relative_position_bias_table)  # whose gradient sums up B * n * n terms, too many for bf16
        bias = F.embedding(index, table).to(dtype)  # (B, 1 + n, m, heads)
        return bias.permute(0, 3, 1, 2).contiguous()[..., :keys]  # fused kernels need the last stride to be 1


class BiasedLinear(nn.Linear):
    """A linear layer without a bias of its own: it is given one."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__(dim, out, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, bias)


class Attention(nn.Module):
    """Multi-head attention with a bias on its logits; queries and values have a learned bias, keys have none."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = BiasedLinear(dim, 3 * dim)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, n, D), (1 or B, heads, n, n) -> (B, n, D)."""
        b, n, dim = x.shape
        qkv = self.qkv(x, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))  # (B, n, 3D)
        q, k, v = qkv.view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, n, D / heads)
        x = F.scaled_dot_product_attention(q, k, v) if bias is None else biased_attention(q, k, v, bias)
        return self.proj(x.transpose(1, 2).reshape(b, n, dim))


class Block(nn.Module):
    """Pre-norm attention and MLP, each scaled channel by channel and skipped at random."""

    def __init__(self, config: RelativeViTConfig, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dim
        self.gamma_1 = nn.Parameter(torch.full((dim,), config.layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), config.layer_scale))
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, config.num_heads)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, n, D), (1 or B, heads, n, n) -> (B, n, D)."""
        x = x + self.drop_path1(self.gamma_1 * self.attn(self.norm1(x), bias))
        return x + self.drop_path2(self.gamma_2 * self.mlp(self.norm2(x)))


class RelativeViT(nn.Module):
    """ViT on visible tokens and mask tokens alike.

    Args:
        image_size: side of the images, in pixels.
        config: the sizes.
    """

    def __init__(self, image_size: int, config: RelativeViTConfig) -> None:
        super().__init__()
        side, dim = image_size // config.patch_size, config.embed_dim
        self.config = config
        self.grid = (side, side)
        self.embed_dim = dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = PatchEmbed(config.patch_size, dim)
        places = 1 + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, places, dim)) if config.absolute_position else None
        self.rel_pos_bias = RelativePositionBias(self.grid, config.num_heads) if config.relative_position else None
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = LayerNorm(dim)
        self._init()

    def _init(self) -> None:
        """Normal with deviation 0.02, cut at one deviation; residual branches start smaller the deeper they are."""
        for token in (self.cls_token, self.mask_token, self.pos_embed):
            if token is not None:
                _trunc_normal(token)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                _trunc_normal(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for i, block in enumerate(self.blocks, start=1):
                block.attn.proj.weight.div_((2 * i) ** 0.5)  # type: ignore[union-attr, operator]
                block.mlp.fc2.weight.div_((2 * i) ** 0.5)  # type: ignore[union-attr, operator]

    def embed(self, images: Tensor, plan: MaskPlan | None) -> tuple[Tensor, Tensor]:
        """The sequence (B, 1 + n, D) and the ids (B' = 1 or B, n) of its patches.

        Without a plan, and with one that throws nothing, it is [class token | all tokens in raster order], so that one
        bias serves all samples; else [class token | visible | kept], each sample at places of its own.
        """
        b, tokens = images.shape[0], self.grid[0] * self.grid[1]
        everywhere = every_token(b, tokens, images.device)  # (B, N)
        at = everywhere if plan is None else plan.visible
        x = self.patch_embed(take_patches(images, at, self.config.patch_size))  # (B, V, D)
        ids = everywhere[:1]
        if plan is not None:
            hidden = self.mask_token.to(x.dtype)
            if plan.thrown.shape[1]:
                x = torch.cat([x, hidden.expand(b, plan.kept.shape[1], -1)], dim=1)  # (B, V + K, D)
                ids = torch.cat([plan.visible, plan.kept], dim=1)
            else:
                x = hidden.expand(b, tokens, -1).scatter(1, at[:, :, None].expand_as(x), x)  # (B, N, D)
        x = torch.cat([self.cls_token.to(x.dtype).expand(b, -1, -1), x], dim=1)  # (B, 1 + n, D)
        if self.pos_embed is not None:
            x = x + F.embedding(F.pad(ids + 1, (1, 0)), self.pos_embed[0])  # row 0 is the class token's
        return x, ids

    def forward(self, images: Tensor, plan: MaskPlan | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + N, D), normed, class token first.

        Under a plan: (B, V + K, D), the visible and the kept tokens before ``norm``, for thrown ones are filled in
        between the last block and the norm.
        """
        x, ids = self.embed(images, plan)
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias(ids, x.dtype)  # (1 or B, heads, 1 + n, 1 + n)
        for block in self.blocks:
            x = block(x, bias)
        if plan is None:
            return self.norm(x)
        if plan.thrown.shape[1]:
            return x[:, 1:]
        return take(x, torch.cat([plan.visible, plan.kept], dim=1) + 1)


def relative_index(ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, n) grid ids -> (B, 1 + n, 1 + n) int64 rows of the bias table, query first, a class token in front."""
    h, w = grid
    rows, cols = ids // w, ids % w
    dr, dc = (axis[:, :, None] - axis[:, None, :] for axis in (rows, cols))  # query minus key
    index = (dr + h - 1) * (2 * w - 1) + dc + w - 1  # (B, n, n)
    special = (2 * h - 1) * (2 * w - 1)
    index = F.pad(index, (0, 0, 1, 0), value=special)  # class token to patch
    index = F.pad(index, (1, 0), value=special + 1)  # patch to class token
    corner = F.pad(index.new_ones(1, 1), (0, ids.shape[1], 0, ids.shape[1]))
    return index + corner  # class token to itself


def _trunc_normal(tensor: Tensor) -> None:
    trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)
