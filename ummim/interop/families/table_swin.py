"""Microsoft's Swin as SimMIM, GreenMIM and LocalMIM store it: sizes, names, and the index of each block's table."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ummim.backbones.group_attention import GroupAttention
from ummim.backbones.table_swin import TOKEN, UNIT, TableSwinConfig, WindowAttention, relative_index
from ummim.interop.family import reorder
from ummim.interop.sizes import (
    Sizes,
    Tensors,
    agreed,
    check_patch,
    depth_of,
    doubling,
    four,
    heads_of,
    mlp_ratio,
    one,
    root,
    shape_of,
    window,
)  # fmt: skip

INDEX = "relative_position_index"
TABLE = "relative_position_bias_table"


def swin_config(tensors: Tensors, sizes: Sizes, image_size: int) -> TableSwinConfig:
    """A Swin's sizes, from official keys under ``encoder.``."""
    check_patch(sizes, TOKEN, UNIT)
    embed = "encoder.patch_embed"
    widths = [shape_of(tensors, f"{embed}.{key}", 0) for key in ("proj.weight", "proj.bias", "norm.weight")]
    dim = doubling(sizes, agreed(128, *widths))
    heads = [
        heads_of(dim * 2**s, (shape_of(tensors, f"{at}.{TABLE}", 1) for at in attentions(tensors, s))) for s in range(4)
    ]
    return TableSwinConfig(
        embed_dim=dim,
        depths=four(sizes, "depth", lambda: [stage_depth(tensors, s) for s in range(4)], growth=1),
        num_heads=four(sizes, "num_heads", lambda: heads),
        window_size=window(sizes, [image_size // TOKEN // 2**s for s in range(4)], stored_window(tensors, 0)),
        mlp_ratio=one(sizes, "mlp_ratio", mlp_ratio(tensors, "encoder.layers.3.blocks.0", 8 * dim)),
    )


def stage_depth(tensors: Tensors, stage: int) -> int:
    """Blocks of a stage."""
    return depth_of(tensors, f"encoder.layers.{stage}.blocks")


def attentions(tensors: Tensors, stage: int) -> list[str]:
    """The prefixes of a stage's attentions."""
    return [f"encoder.layers.{stage}.blocks.{b}.attn" for b in range(stage_depth(tensors, stage))]


def stored_window(tensors: Tensors, stage: int) -> int:
    """Side of a stage's windows, off its tables, of (2 side - 1)**2 rows, and its indices, (side**2, side**2)."""
    read: list[int | None] = []
    for at in attentions(tensors, stage):
        offsets = root(shape_of(tensors, f"{at}.{TABLE}", 0))
        read.append((offsets + 1) // 2 if offsets is not None and offsets % 2 else None)
        read += [root(shape_of(tensors, f"{at}.{INDEX}", dim)) for dim in (0, 1)]
    return agreed(7, *read)


def stored_image_size(tensors: Tensors) -> int:
    """Side of the images, off the smaller windows of late stages, which are the whole map, and off the shifted
    windows' masks, of one entry for each window; else that at which the last stage is one window, the least.
    """
    side = stored_window(tensors, 0)
    read: list[int | None] = []
    for s in range(4):
        pixels = TOKEN * 2**s  # of a token
        last = stored_window(tensors, s)
        read.append(last * pixels if last < side else None)
        for b in range(stage_depth(tensors, s)):
            windows = root(shape_of(tensors, f"encoder.layers.{s}.blocks.{b}.attn_mask", 0))
            read.append(None if windows is None else windows * side * pixels)
    return agreed(side * UNIT, *read)


def swin_names(named: Mapping[str, str], first: Iterable[str]) -> dict[str, str]:
    """{official key: our key}, the keys that start with one of ``first`` in front.

    A merge belongs to the stage before it there, to the stage after it here (and in timm).
    """
    before = re.compile(r"(?<=^encoder\.layers\.)(\d)(?=\.downsample\.)")
    front = tuple(first)

    def place(official: str) -> tuple[int, ...]:
        """In a stage the blocks stand first, then the merge, its linear layer before its norm."""
        match = re.match(r"encoder\.layers\.(\d)\.(?:blocks|downsample\.(reduction|norm))\.", official)
        if match:
            return 1, int(match[1]), (None, "reduction", "norm").index(match[2])
        return (0,) if official.startswith(front) else (2,)

    return reorder({before.sub(lambda s: str(int(s[0]) - 1), key): ours for key, ours in named.items()}, place)


def position_indices(model: Any) -> dict[str, Tensor]:
    """Each block's index into its position table, (n, n) int64 for a full window of n tokens, on the CPU."""
    indices = {}
    for name, module in model.named_modules():
        if isinstance(module, (GroupAttention, WindowAttention)):
            side = ((root(module.relative_position_bias_table.shape[0]) or 0) + 1) // 2
            indices[f"{name}.{INDEX}"] = relative_index(side, torch.device("cpu"))
    return indices
