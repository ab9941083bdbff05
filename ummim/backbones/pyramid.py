"""What UM-MAE's pyramid encoders (Swin, PVT) share: 4-pixel tokens, and how 16-pixel mask patches are hidden.

Source: UM-MAE, sections 3.1 and 3.2, and its official code's SimMIM baselines.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ummim.masking import MaskPlan
from ummim.nn.layers import LayerNorm, PatchConv, every_token, split_patches, take_patches

MASK_PATCH = 16  # pixels: the unit of UM-MAE's masks
TOKEN = 4  # pixels: the side of a first-stage token

Hiding = Literal["compact", "replace"]


class PatchEmbed(nn.Module):
    """4x4-pixel tokens of the given patches, with a LayerNorm in Swin."""

    def __init__(self, dim: int, norm: bool) -> None:
        super().__init__()
        self.proj = PatchConv(TOKEN, dim)
        self.norm = LayerNorm(dim) if norm else nn.Identity()
        nn.init.zeros_(self.proj.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, n, 3, 16, 16) -> (B, n, 16, C): each patch's 4x4 tokens, row-major."""
        return self.norm(self.proj(split_patches(patches, TOKEN)))


class PatchMerge(nn.Module):
    """A 2x2 convolution of stride 2, after a LayerNorm in Swin: (B, H, W, C) -> (B, H/2, W/2, out)."""

    def __init__(self, dim: int, out: int, norm: bool) -> None:
        super().__init__()
        self.norm = LayerNorm(dim) if norm else nn.Identity()
        self.proj = nn.Conv2d(dim, out, 2, stride=2)
        nn.init.normal_(self.proj.weight, std=(2.0 / (4 * out)) ** 0.5)
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class Pyramid(nn.Module):
    """The part of a pyramid encoder before its first stage.

    Under a plan, masked patches are hidden in one of two ways; without one, the whole image is seen.

    * ``compact`` (UM-MAE): of every 2x2 block of patches only the visible one is laid down, so the map is that of
      an image half as wide. Secondary-masked patches become the ``vis_mask_token``, which passes the patch
      embedding's norm where there is one.
    * ``replace`` (SimMIM, as in UM-MAE's official code): masked patches' tokens become the ``mask_token`` after
      the patch embedding and its norm; the map is the whole image's.

    Args:
        image_size: side of the image, a multiple of 16.
        dim: width of the first stage.
        norm: the patch embedding ends in a LayerNorm.
        hiding: how masked patches are hidden.
        secondary: ``compact`` has a ``vis_mask_token``.
    """

    def __init__(self, image_size: int, dim: int, norm: bool, hiding: Hiding, secondary: bool) -> None:
        super().__init__()
        self.hiding = hiding
        self.grid = (image_size // MASK_PATCH, image_size // MASK_PATCH)
        self.patch_embed = PatchEmbed(dim, norm)
        self.vis_mask_token = _token(dim) if hiding == "compact" and secondary else None
        self.mask_token = _token(dim) if hiding == "replace" else None

    def compacts(self, plan: MaskPlan | None) -> bool:
        """True if the map under this plan is compact.

        Raises:
            ValueError: a plan that is not uniform, where only such a one can be compacted.
        """
        compact = plan is not None and self.hiding == "compact"
        if plan is not None and compact and not plan.compact:
            raise ValueError("this encoder compacts the grid: it needs a uniform plan (one visible in each 2x2)")
        return compact

    def embed(self, images: Tensor, plan: MaskPlan | None) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, H', W', C) and the true token coordinates of its rows and columns, each (B', H', W') int64.

        Only visible patches are embedded. B' is 1 where the coordinates are every sample's.
        """
        h, w = self.grid
        everywhere = every_token(images.shape[0], h * w, images.device)  # (B, N)
        ids = everywhere if plan is None else plan.visible
        x = self.patch_embed(take_patches(images, ids, MASK_PATCH))  # (B, V, 16, C)
        if self.compacts(plan):
            h, w = h // 2, w // 2
        else:
            ids = everywhere[:1]
        if plan is not None:
            x = self.hide(x, plan)  # (B, V or N, 16, C)
        t = MASK_PATCH // TOKEN
        inner = torch.arange(t, device=ids.device)
        rows = (ids // self.grid[1] * t)[:, :, None, None] + inner[:, None] + 0 * inner  # (B', V or N, t, t)
        cols = (ids % self.grid[1] * t)[:, :, None, None] + inner + 0 * inner[:, None]
        x, rows, cols = (_lay(tiles, h, w, t) for tiles in (x, rows, cols))
        return x, rows[..., 0], cols[..., 0]

    def hide(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """(B, V, 16, C) -> the same with secondary-masked patches replaced, or (B, N, 16, C) with masked ones."""
        if self.mask_token is not None:
            b, _, n, c = x.shape
            hidden = self.mask_token.to(x.dtype)[:, :, None].expand(b, self.grid[0] * self.grid[1], n, c)
            return hidden.scatter(1, plan.visible[:, :, None, None].expand(-1, -1, n, c), x)
        if self.vis_mask_token is None:
            return x
        hidden = self.patch_embed.norm(self.vis_mask_token)  # (1, 1, C)
        return torch.where(plan.secondary[:, :, None, None], hidden.to(x.dtype), x)


def _token(dim: int) -> nn.Parameter:
    token = nn.Parameter(torch.zeros(1, 1, dim))
    nn.init.normal_(token, std=0.02)
    return token


def _lay(tiles: Tensor, h: int, w: int, t: int) -> Tensor:
    """(B, h * w, t * t, C) or (B, h * w, t, t) -> (B, h * t, w * t, C or 1): tiles to a map."""
    tiles = tiles.reshape(tiles.shape[0], h, w, t, t, -1)
    return tiles.transpose(2, 3).reshape(tiles.shape[0], h * t, w * t, -1)
