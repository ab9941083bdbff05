"""Swin encoder that sees the visible 32-pixel units of an image only, through all four stages.

Source: GreenMIM (Huang et al., NeurIPS 2022), section 3; LocalMIM's Swin is the same. Units stay whole down to the
last stage, where a unit is one token, so merging never mixes visible and masked tokens. Attention is among the
visible tokens of each window: see :mod:`ummim.backbones.group_attention`.

Tokens are kept unit by unit, in the plan's order, row-major inside each unit: (B, V * side**2, C) with side = 8, 4,
2 and 1 tokens at the four stages.
"""

from typing import NamedTuple

import numpy as np
import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from ummim.backbones.group_attention import GroupAttention, Grouping, Groups, unit_groups
from ummim.backbones.table_swin import TOKEN, UNIT, TableSwinConfig
from ummim.masking import MaskPlan
from ummim.nn.layers import LayerNorm, PatchConv, every_token, finer_cells, init_mae, split_patches, take_patches


class StageTokens(NamedTuple):
    """Sparse tokens of a map."""

    x: Tensor  # (B, n, C)
    ids: Tensor  # (B, n) int64 raster cells on ``grid``
    grid: tuple[int, int]


class PatchEmbed(nn.Module):
    """4x4-pixel tokens of the given units, with a LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = PatchConv(TOKEN, dim)
        self.norm = LayerNorm(dim)

    def forward(self, units: Tensor) -> Tensor:
        """(B, V, 3, p, p) -> (B, V * side**2, C), side = p / 4: row-major inside each unit."""
        return self.norm(self.proj(split_patches(units, TOKEN).flatten(1, 2)))


class PatchMerging(nn.Module):
    """Swin's merge: the 2x2 tokens concatenated column by column (TL, BL, TR, BR), LayerNorm, Linear 4C -> 2C.

    ``row_major`` is the order TL, TR, BL, BR of GreenMIM's first release and of LocalMIM.
    """

    def __init__(self, dim: int, row_major: bool) -> None:
        super().__init__()
        self.row_major = row_major
        self.norm = LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, side: int) -> Tensor:
        """(B, V * side**2, C) -> (B, V * (side / 2)**2, 2C)."""
        b, n, c = x.shape
        x = x.view(b, -1, side // 2, 2, side // 2, 2, c)  # (B, V, rows, 2, columns, 2, C)
        x = x.permute(0, 1, 2, 4, 3, 5, 6) if self.row_major else x.permute(0, 1, 2, 4, 5, 3, 6)
        return self.reduction(self.norm(x.reshape(b, n // 4, 4 * c)))


class SparseBlock(nn.Module):
    """Pre-norm attention within windows, and MLP."""

    def __init__(self, dim: int, num_heads: int, window: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = GroupAttention(dim, num_heads, window)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, order: Tensor | None, place: Tensor | None, bias_index: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C); the other arguments are those of :class:`Groups`."""
        x = x + self.drop_path1(self.attn(self.norm1(x), order, place, bias_index))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """An optional merge, then blocks that alternate plain and shifted windows; its keys are timm's."""

    def __init__(
        self, dim: int, heads: int, window: int, mlp_ratio: float, drop_paths: list[float], merge: PatchMerging | None
    ) -> None:
        super().__init__()
        self.downsample = merge
        self.blocks = nn.ModuleList(SparseBlock(dim, heads, window, mlp_ratio, rate) for rate in drop_paths)

    def forward(self, x: Tensor, plain: Groups, shifted: Groups) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        for i, block in enumerate(self.blocks):
            x = block(x, *(shifted if i % 2 else plain))
        return x


class SparseSwin(nn.Module):
    """Swin on the visible units of a mask that the batch shares; on all units without a plan. Keys are timm's.

    Every LayerNorm has eps 1e-6, as in GreenMIM and LocalMIM (Swin's own: 1e-5).

    The groups are a function of the mask, made on the host. Their number and size change with it, so a compiled
    forward is compiled anew for every mask; compile the blocks instead, or run eagerly.

    Args:
        image_size: side of the images in pixels, a multiple of 32.
        config: the Swin's size.
        row_major_merge: merge 2x2 tokens in the order TL, TR, BL, BR (see :class:`PatchMerging`).
        legacy_coordinates: place the tokens of stages 2 and 3 as LocalMIM's official code does: the i-th token,
            unit by unit, at raster cell i, which is another token's for nine of ten.
        final_norm: norm the output of :meth:`forward`.
    """

    def __init__(
        self,
        image_size: int,
        config: TableSwinConfig,
        row_major_merge: bool = False,
        legacy_coordinates: bool = False,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.image_size = image_size
        self.grid = (image_size // UNIT, image_size // UNIT)
        self.legacy_coordinates = legacy_coordinates
        dims = [config.embed_dim * 2**s for s in range(4)]
        self.embed_dim = dims[-1]
        self.patch_embed = PatchEmbed(dims[0])
        self.layers = nn.ModuleList(
            Stage(
                dims[s],
                config.num_heads[s],
                config.window(image_size, s),
                config.mlp_ratio,
                config.drop_paths(s),
                PatchMerging(dims[s - 1], row_major_merge) if s else None,
            )
            for s in range(4)
        )
        self.norm = LayerNorm(self.embed_dim) if final_norm else nn.Identity()
        self.apply(init_mae)

    def blocks(self) -> list[nn.Module]:
        """All blocks, first to last."""
        return [block for layer in self.layers for block in layer.blocks]  # type: ignore[union-attr]

    def side(self, stage: int) -> int:
        """Tokens along the side of a unit."""
        return UNIT // TOKEN // 2**stage

    def groups(self, units: tuple[int, ...], stage: int, device: torch.device) -> tuple[Groups, Groups]:
        """The groups of the stage's plain and of its shifted windows, on the device."""
        side, window = self.side(stage), self.config.window(self.image_size, stage)
        legacy = self.legacy_coordinates and stage > 0
        plain = _to_device(unit_groups(units, self.grid, side, window, 0, legacy), device)
        if window == side * self.grid[0]:  # one window: nothing to shift
            return plain, plain
        return plain, _to_device(unit_groups(units, self.grid, side, window, window // 2, legacy), device)

    def features(self, images: Tensor, plan: MaskPlan | None = None) -> list[StageTokens]:
        """What each stage hands on: the merged tokens of stages 1 to 3, the tokens of stage 4, before any norm.

        Returns:
            four times tokens (B, V * side**2, C) with side = 4, 2, 1, 1 and C = 2, 4, 8, 8 widths, unit by unit,
            and their true cells (B, V * side**2) on the grid of h * side by w * side.

        Raises:
            ValueError: a plan whose samples do not share one mask.
        """
        h, w = self.grid
        ids = every_token(images.shape[0], h * w, images.device) if plan is None else plan.visible
        units = tuple(range(h * w)) if plan is None else plan.shared
        if units is None:
            raise ValueError("this encoder groups the tokens of a whole batch: all samples must share one mask")
        x = self.patch_embed(take_patches(images, ids, UNIT))  # (B, V * 64, C)
        taps = []
        for s, layer in enumerate(self.layers):
            x = layer(x, *self.groups(units, s, images.device))
            if s < 3:
                x = self.layers[s + 1].downsample(x, self.side(s))  # type: ignore[operator]
            side = self.side(min(s + 1, 3))
            taps.append(StageTokens(x, finer_cells(ids, self.grid[1], side), (h * side, w * side)))
        return taps

    def forward(self, images: Tensor, plan: MaskPlan | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, V, 8C): the normed token of each visible unit in the plan's order (all without one).

        Raises:
            ValueError: a plan whose samples do not share one mask.
        """
        return self.norm(self.features(images, plan)[-1].x)


def _to_device(grouping: Grouping, device: torch.device) -> Groups:
    order, place, bias_index = grouping
    return Groups(
        None if order is None else _copy(order, device),
        None if place is None else _copy(place, device),
        _copy(bias_index, device),
    )


def _copy(array: np.ndarray, device: torch.device) -> Tensor:
    """Through pinned memory to a GPU, so that the host does not wait for it."""
    tensor = torch.tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
