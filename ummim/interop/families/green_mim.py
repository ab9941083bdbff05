"""LayneH/GreenMIM: GreenMIM on Swin. The decoder's order is the mended one (docs/fidelity.md, Q-G6)."""

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ummim.backbones.group_attention import GroupAttention
from ummim.backbones.table_swin import TOKEN, UNIT, TableSwinConfig, relative_index
from ummim.interop.families.um_mae import window
from ummim.interop.family import Family, rename, reorder
from ummim.interop.sizes import (
    VIT_SIZES,
    Sizes,
    Tensors,
    decoder,
    depth_of,
    fitting,
    four,
    mlp_ratio,
    one,
    partial,
    shape_of,
)  # fmt: skip
from ummim.methods import green_mim

SWIN_SIZES = (*VIT_SIZES, "window_size", "row_major_merge")

# Our prefixes and the official ones; the order of the rows is the official order of keys.
PREFIXES = (
    ("decoder.mask_token", "mask_token"),
    ("decoder.pos_embed", "decoder_pos_embed"),
    ("encoder.", "encoder."),
    ("embed.", "decoder_embed."),
    ("decoder.blocks.", "decoder_blocks."),
    ("head.norm.", "decoder_norm."),
    ("head.pred.", "decoder_pred."),
    ("aggregation.dwconv.", "pr_dwconv."),  # PR-MIM has no official code, so these names are our own
)


def build(tensors: Tensors, sizes: Sizes) -> green_mim.GreenMIM:
    """GreenMIM of these sizes, which may say ``row_major_merge`` for a checkpoint of the first release.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    image_size = one(sizes, "img_size", isqrt(shape_of(tensors, "decoder_pos_embed", 1, 49)) * UNIT)
    config = green_mim.Config(
        encoder=swin_config(tensors, sizes, image_size),
        decoder=decoder(tensors, sizes),
        norm_pix_loss=bool(sizes["norm_pix_loss"]),
        row_major_merge=bool(sizes.get("row_major_merge", False)),
    )
    fitting(config.check_sizes(image_size))
    return green_mim.GreenMIM(image_size, config, *partial(tensors))


def swin_config(tensors: Tensors, sizes: Sizes, image_size: int) -> TableSwinConfig:
    """A Swin's sizes, from official keys under ``encoder.``; the window is that of the first stage's table."""
    if one(sizes, "patch_size", TOKEN) not in (TOKEN, UNIT):
        raise ValueError(f"patch_size is {TOKEN} (tokens) or {UNIT} (mask units), not {sizes['patch_size']}")
    dims = four(sizes, "embed_dim", shape_of(tensors, "encoder.patch_embed.proj.weight", 0, 128))
    if any(dims[s + 1] != 2 * dims[s] for s in range(3)):
        raise ValueError(f"embed_dims = {dims} must double at every stage")
    tables = [f"encoder.layers.{s}.blocks.0.attn.relative_position_bias_table" for s in range(4)]
    heads = [shape_of(tensors, table, 1, 4 * 2**s) for s, table in enumerate(tables)]
    side = (isqrt(shape_of(tensors, tables[0], 0, 169)) + 1) // 2
    return TableSwinConfig(
        embed_dim=dims[0],
        depths=four(sizes, "depth", [depth_of(tensors, rf"encoder\.layers\.{s}\.blocks") for s in range(4)], growth=1),
        num_heads=four(sizes, "num_heads", heads),
        window_size=window(sizes, [image_size // TOKEN // 2**s for s in range(4)], side),
        mlp_ratio=one(sizes, "mlp_ratio", mlp_ratio(tensors, "encoder.layers.0.blocks.0", dims[0])),
    )


def names(model: green_mim.GreenMIM) -> dict[str, str]:
    """{official key: our key}, in the official order."""
    return swin_names(rename(model, PREFIXES))


def swin_names(named: Mapping[str, str]) -> dict[str, str]:
    """A merge belongs to the stage before it there, to the stage after it here (and in timm)."""
    before = re.compile(r"(?<=^encoder\.layers\.)(\d)(?=\.downsample\.)")
    return reorder({before.sub(lambda s: str(int(s[0]) - 1), key): ours for key, ours in named.items()}, _place)


def _place(official: str) -> tuple[int, ...]:
    """In a stage the blocks stand first, then the merge, its linear layer before its norm."""
    match = re.match(r"encoder\.layers\.(\d)\.(?:blocks|downsample\.(reduction|norm))\.", official)
    if match:
        return 1, int(match[1]), (None, "reduction", "norm").index(match[2])
    first = ("mask_token", "decoder_pos_embed", "encoder.patch_embed.")
    return (0,) if official.startswith(first) else (2,)


def position_indices(model: Any) -> dict[str, Tensor]:
    """Each block's index into its position table, (n, n) int64 for a full window of n tokens, on the CPU."""
    indices = {}
    for name, module in model.named_modules():
        if isinstance(module, GroupAttention):
            side = (isqrt(module.relative_position_bias_table.shape[0]) + 1) // 2
            indices[f"{name}.relative_position_index"] = relative_index(side, torch.device("cpu"))
    return indices


FAMILIES = {"green_mim_swin": Family(green_mim.GreenMIM, build, SWIN_SIZES, names, constants=position_indices)}
