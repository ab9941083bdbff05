"""Swin with relative position tables, on the whole map; masked units become a mask token (SimMIM).

Source: "Swin Transformer", sections 3.1 to 3.3, and SimMIM, section 3.2. Parameter names are timm's: the merge
into a stage belongs to that stage (``layers.1.downsample`` stands between the first two).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn
from torch.nn import functional as F

from ummim.backbones.window import attend, merge_windows, partition, shift_mask
from ummim.masking import MaskPlan
from ummim.nn.layers import PatchConv, every_token, split_patches, take_patches

TOKEN = 4  # pixels: the side of a first-stage token
UNIT = 32  # pixels: the side of a last-stage token, and of a mask unit


@dataclass(frozen=True)
class TableSwinConfig:
    """A Swin's size; the default is Swin-B.

    Attributes:
        kind: names this encoder in a recipe.
        embed_dim: width of the first stage; it doubles at each of the three merges.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window_size: side of an attention window, in tokens; a map no larger becomes one window.
        mlp_ratio: hidden width of the MLP, in widths.
        drop_path: chance that the last block's branches are skipped for a sample; it grows linearly from 0.
    """

    kind: Literal["swin"] = field(default="swin", kw_only=True)
    embed_dim: int = 128
    depths: tuple[int, int, int, int] = (2, 2, 18, 2)
    num_heads: tuple[int, int, int, int] = (4, 8, 16, 32)
    window_size: int = 7
    mlp_ratio: float = 4.0
    drop_path: float = 0.0

    def window(self, image_size: int, stage: int) -> int:
        """Side of a stage's window: the configured one, or the whole map where that is no larger."""
        return min(self.window_size, image_size // TOKEN // 2**stage)

    def drop_paths(self, stage: int) -> list[float]:
        """The chances of a stage's blocks."""
        before, depth = sum(self.depths[:stage]), sum(self.depths)
        return [self.drop_path * (before + i) / max(1, depth - 1) for i in range(self.depths[stage])]

    def check_windows(self, image_size: int) -> Iterable[tuple[str, str]]:
        """(key, problem) for an image that does not reach the last stage whole, and windows that do not divide a map.

        An image is a multiple of 32 pixels, since padding would let a window see tokens that are not there.
        """
        if image_size < UNIT or image_size % UNIT:
            near = max(UNIT, round(image_size / UNIT) * UNIT)
            yield (
                "data.image_size",
                f"{image_size} pixels do not merge to four Swin stages: use a multiple of {UNIT}, such as {near}",
            )
            return
        for stage in range(4):
            side, window = image_size // TOKEN // 2**stage, self.window(image_size, stage)
            if window < 1 or side % window:
                yield (
                    "method.encoder.window_size",
                    f"a window of {self.window_size} does not divide the {side}x{side} tokens of stage {stage + 1}; "
                    f"choose a divisor of {side}",
                )


class PatchEmbed(nn.Module):
    """4x4-pixel tokens of square pieces of the image, with a LayerNorm (eps 1e-5)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = PatchConv(TOKEN, dim)
        self.proj.reset_parameters()  # Swin leaves PyTorch's initialisation
        self.norm = nn.LayerNorm(dim)

    def forward(self, pieces: Tensor) -> Tensor:
        """(B, n, 3, p, p) -> (B, n, (p / 4) ** 2, C): each piece's tokens, row-major."""
        return self.norm(self.proj(split_patches(pieces, TOKEN)))


class WindowAttention(nn.Module):
    """Multi-head attention in windows, biased by a table of relative positions.

    Args:
        dim: width.
        num_heads: heads.
        window: side of the window that the table is for.
    """

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias(self, index: Tensor, mask: Tensor | None) -> Tensor:
        """(n, n), (nW, n, n) -> (1, 1 or nW, heads, n, n): the same for every sample."""
        bias = F.embedding(index, self.relative_position_bias_table).permute(2, 0, 1).contiguous()  # (heads, n, n)
        return bias[None, None] if mask is None else (bias + mask[:, None].to(bias.dtype))[None]

    def forward(self, x: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
        """(B, nW, n, C) -> (B, nW, n, C)."""
        return self.proj(attend(self.qkv(x), self.num_heads, self.bias(index, mask)))


class Block(nn.Module):
    """Pre-norm window attention and MLP on a (B, H, W, C) map."""

    def __init__(self, dim: int, num_heads: int, window: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, index: Tensor, mask: Tensor | None, shift: int) -> Tensor:
        """(B, H, W, C) -> the same; windows are those of the map rolled by ``shift`` up and left."""
        _, h, w, _ = x.shape
        window = int(index.shape[-1] ** 0.5)
        y = self.norm1(x)
        y = torch.roll(y, (-shift, -shift), (1, 2)) if shift else y
        y = merge_windows(self.attn(partition(y, window), index, mask), window, h, w)
        y = torch.roll(y, (shift, shift), (1, 2)) if shift else y
        x = x + self.drop_path1(y)
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """A merge of 2x2 tokens (not before the first stage), then blocks that alternate plain and shifted windows."""

    def __init__(self, dim: int, heads: int, window: int, mlp_ratio: float, drop_paths: list[float], merge: bool):
        super().__init__()
        self.window = window
        # 2x2 tokens in the order top left, bottom left, top right, bottom right -> LayerNorm -> Linear
        self.downsample = PatchMerging(dim // 2) if merge else nn.Identity()
        self.blocks = nn.ModuleList(Block(dim, heads, window, mlp_ratio, rate) for rate in drop_paths)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), or (B, H/2, W/2, 2C) with a merge."""
        x = self.downsample(x)
        _, h, w, _ = x.shape
        index = relative_index(self.window, x.device)
        shift = self.window // 2 if self.window < h else 0
        mask = shift_mask(h, w, self.window, shift, x.device) if shift else None
        for i, block in enumerate(self.blocks):
            x = block(x, index, mask if i % 2 else None, shift if i % 2 else 0)
        return x


class TableSwin(nn.Module):
    """Microsoft's Swin; under a plan, tokens of masked units become ``mask_token`` after the patch embedding.

    Args:
        image_size: side of the image, a multiple of 32.
        config: sizes.
    """

    def __init__(self, image_size: int, config: TableSwinConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = image_size
        self.grid = (image_size // UNIT, image_size // UNIT)
        self.embed_dim = config.embed_dim * 8
        self.patch_embed = PatchEmbed(config.embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.layers = nn.ModuleList(
            Stage(
                config.embed_dim * 2**s,
                config.num_heads[s],
                config.window(image_size, s),
                config.mlp_ratio,
                config.drop_paths(s),
                merge=s > 0,
            )
            for s in range(4)
        )
        self.norm = nn.LayerNorm(self.embed_dim)
        self.apply(_init_linear)
        trunc_normal_(self.mask_token, std=0.02)

    def embed(self, images: Tensor, plan: MaskPlan | None) -> Tensor:
        """(B, 3, H, W) -> (B, H/4, W/4, C): only visible units are embedded, the others are the mask token."""
        b = images.shape[0]
        (h, w), t = self.grid, UNIT // TOKEN
        ids = every_token(b, h * w, images.device) if plan is None else plan.visible
        x = self.patch_embed(take_patches(images, ids, UNIT))  # (B, V, 64, C)
        if plan is not None:
            hidden = self.mask_token.to(x.dtype)[:, None].expand(b, h * w, t * t, -1)
            x = hidden.scatter(1, ids[:, :, None, None].expand(-1, -1, t * t, x.shape[-1]), x)  # (B, h * w, 64, C)
        return x.view(b, h, w, t, t, -1).transpose(2, 3).reshape(b, h * t, w * t, -1)

    def forward(self, images: Tensor, plan: MaskPlan | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, H/32, W/32, 8C): the last stage's normed map."""
        x = self.embed(images, plan)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def relative_index(window: int, device: torch.device) -> Tensor:
    """(n, n) int64 rows of a window's table, query first: (dr + w - 1) (2w - 1) + (dc + w - 1), query minus key."""
    at = torch.arange(window**2, device=device)
    rows, cols = at // window, at % window
    dr, dc = (axis[:, None] - axis[None, :] + window - 1 for axis in (rows, cols))
    return dr * (2 * window - 1) + dc


def _init_linear(module: nn.Module) -> None:
    """Swin's: normal weights of deviation 0.02, zero biases; LayerNorm keeps 1 and 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
