"""Swin encoder on a compact grid: the visible patch of every 2x2 block, as if the image were half as wide.

Source: UM-MAE, sections 3.1 and 3.2. Since neighbours on the compact grid are not neighbours in the image, the
relative position bias is a small MLP of the *true* coordinate differences.
"""

from dataclasses import dataclass

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from ummim.backbones.window import Geometry, merge_windows, partition, window_geometry
from ummim.masking import MaskPlan
from ummim.nn.layers import LayerNorm, PatchConv, every_token, init_mae, take_patches

MASK_PATCH = 16  # pixels: the unit of UM-MAE's masks
TOKEN = 4  # pixels: the side of a first-stage token


@dataclass(frozen=True)
class SwinConfig:
    """A Swin's size; the default is Swin-T.

    Attributes:
        embed_dim: width of the first stage; it doubles at each of the three merges.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window_size: side of an attention window, in tokens; a smaller grid becomes one window.
        mlp_ratio: hidden width of the MLP, in widths.
        pos_mlp_dim: hidden width of the relative position MLP.
    """

    embed_dim: int = 96
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    num_heads: tuple[int, int, int, int] = (3, 6, 12, 24)
    window_size: int = 8
    mlp_ratio: float = 4.0
    pos_mlp_dim: int = 32


class PatchEmbed(nn.Module):
    """4x4-pixel tokens of the given patches, with a LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = PatchConv(TOKEN, dim)
        self.norm = LayerNorm(dim)
        nn.init.zeros_(self.proj.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, n, 3, 16, 16) -> (B, n, 16, C): each patch's 4x4 tokens, row-major."""
        b, n, c, p, _ = patches.shape
        t = p // TOKEN
        tokens = patches.view(b, n, c, t, TOKEN, t, TOKEN).permute(0, 1, 3, 5, 2, 4, 6).reshape(b, n, t * t, -1)
        return self.norm(self.proj(tokens))


class PatchMerge(nn.Module):
    """LayerNorm, then a 2x2 convolution of stride 2: (B, H, W, C) -> (B, H/2, W/2, 2C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.proj = nn.Conv2d(dim, 2 * dim, 2, stride=2)
        _init_conv(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class WindowAttention(nn.Module):
    """Multi-head attention in windows, biased by an MLP of the signed log of coordinate differences."""

    def __init__(self, dim: int, num_heads: int, pos_mlp_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.posmlp = nn.Sequential(nn.Linear(2, pos_mlp_dim), nn.ReLU(), nn.Linear(pos_mlp_dim, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def bias(self, differences: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
        """(L, 2), (B', nW, n, n), (nW, n, n) -> (B', nW, heads, n, n).

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
        b, windows, n, c = x.shape
        q, k, v = self.qkv(x).view(b * windows, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.bias(differences, index, mask).expand(b, windows, -1, -1, -1).flatten(0, 1)
        if x.is_cpu:
            # The fused CPU kernel has no gradient for a bias and steps in only where none is wanted, so the forward
            # of reentrant checkpointing and its recomputation would differ in the last bit.
            x = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B * nW, heads, n, C / heads)
        return self.proj(x.transpose(1, 2).reshape(b, windows, n, c))


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
        self.merge = PatchMerge(dim // 2) if merge else None
        self.blocks = nn.ModuleList(SwinBlock(dim, num_heads, config) for _ in range(depth))

    def forward(self, x: Tensor, plain: Geometry, shifted: Geometry) -> Tensor:
        x = x if self.merge is None else self.merge(x)
        for i, block in enumerate(self.blocks):
            g = shifted if i % 2 else plain
            x = block(x, g.differences, g.index, g.mask, g.shift)
        return x


class Swin(nn.Module):
    """Swin with position MLPs: compact under a uniform plan, dense without one."""

    def __init__(self, image_size: int, config: SwinConfig, secondary: bool = True) -> None:
        super().__init__()
        self.config = config
        self.grid = (image_size // MASK_PATCH, image_size // MASK_PATCH)
        self.patch_embed = PatchEmbed(config.embed_dim)
        self.vis_mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim)) if secondary else None
        self.stages = nn.ModuleList(
            Stage(config.embed_dim * 2**s, config.depths[s], config.num_heads[s], s > 0, config) for s in range(4)
        )
        self.embed_dim = config.embed_dim * 8
        self.norm = LayerNorm(self.embed_dim)
        self.apply(init_mae)
        for module in self.modules():
            if isinstance(module, WindowAttention):
                _init_position_mlp(module.posmlp)
        if self.vis_mask_token is not None:
            nn.init.normal_(self.vis_mask_token, std=0.02)

    def embed(self, images: Tensor, plan: MaskPlan | None) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, H', W', C) and the true token coordinates of its rows and columns, each (B', H', W') int64.

        Only visible patches are embedded; secondary-masked ones become the normed ``vis_mask_token``.
        """
        h, w = self.grid
        ids = every_token(images.shape[0], h * w, images.device) if plan is None else plan.visible
        if plan is not None:
            h, w = h // 2, w // 2
        x = self.patch_embed(take_patches(images, ids, MASK_PATCH))  # (B, V, 16, C)
        if plan is not None and self.vis_mask_token is not None:
            hidden = self.patch_embed.norm(self.vis_mask_token)  # (1, 1, C)
            x = torch.where(plan.secondary[:, :, None, None], hidden, x)
        t = MASK_PATCH // TOKEN
        inner = torch.arange(t, device=ids.device)
        ids = ids[:1] if plan is None else ids  # a dense image's coordinates are every sample's
        rows = (ids // self.grid[1] * t)[:, :, None, None] + inner[:, None] + 0 * inner  # (B', V, t, t)
        cols = (ids % self.grid[1] * t)[:, :, None, None] + inner + 0 * inner[:, None]
        tiles = [tile.reshape(tile.shape[0], h, w, t, t, -1) for tile in (x, rows, cols)]
        x, rows, cols = (tile.transpose(2, 3).reshape(tile.shape[0], h * t, w * t, -1) for tile in tiles)
        return x, rows[..., 0], cols[..., 0]

    def forward(self, images: Tensor, plan: MaskPlan | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, 8C): the last stage's normed map; with a plan, of the compact grid.

        Raises:
            ValueError: a plan that is not uniform.
        """
        if plan is not None and not plan.compact:
            raise ValueError("this encoder compacts the grid: it needs a uniform plan (one visible in each 2x2)")
        x, rows, cols = self.embed(images, plan)
        for s, stage in enumerate(self.stages):
            if s:
                rows, cols = rows[:, ::2, ::2], cols[:, ::2, ::2]  # a merged token keeps its top-left coordinate
            geometry = [
                window_geometry(rows, cols, self.config.window_size, shifted, stage=s, compact=plan is not None)
                for shifted in (False, True)
            ]
            x = stage(x, *geometry)
        return self.norm(x)


def _init_conv(conv: nn.Conv2d) -> None:
    """N(0, sqrt(2 / fan_out)), bias 0 (UM-MAE)."""
    nn.init.normal_(conv.weight, std=(2.0 / (conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels)) ** 0.5)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _init_position_mlp(mlp: nn.Sequential) -> None:
    """The official position MLP is two 1x1 convolutions, with a convolution's initialisation."""
    for layer in (mlp[0], mlp[2]):
        assert isinstance(layer, nn.Linear)
        nn.init.normal_(layer.weight, std=(2.0 / layer.out_features) ** 0.5)
        nn.init.zeros_(layer.bias)
