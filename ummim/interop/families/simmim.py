"""microsoft/SimMIM on ViT and Swin, and implus/UM-MAE's SimMIM baselines on Swin and PVT."""

from typing import Any

import torch
from torch import Tensor

from ummim.backbones import relative_vit
from ummim.backbones.pvt import PVT
from ummim.backbones.pyramid import TOKEN
from ummim.backbones.relative_vit import RelativeViT, RelativeViTConfig
from ummim.backbones.swin import Swin
from ummim.backbones.table_swin import TableSwin
from ummim.backbones.window import shift_mask
from ummim.interop.families.table_swin import (
    INDEX,
    TABLE,
    position_indices,
    stored_image_size,
    swin_config,
    swin_names,
)
from ummim.interop.families.um_mae import pointwise, pvt_config, stage_names
from ummim.interop.families.um_mae import swin_config as um_swin_config
from ummim.interop.family import Family, rename, reorder
from ummim.interop.sizes import (
    Sizes,
    Tensors,
    agreed,
    depth_of,
    fitting,
    heads_of,
    kernel_side,
    mlp_ratio,
    one,
    partial,
    pixel_side,
    root,
    shape_of,
    table_side,
)  # fmt: skip
from ummim.methods.simmim import Config, SimMIM

VIT_SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "norm_pix_loss")
SWIN_SIZES = (*VIT_SIZES, "window_size")
UM_SWIN_SIZES = (*SWIN_SIZES, "posmlp_dim")
UM_PVT_SIZES = (*VIT_SIZES, "sr_ratios")
CPU = torch.device("cpu")

# Our prefixes and the official ones; the order of the rows is the official order of keys.
ROWS = (("encoder.", "encoder."), ("head.", "decoder.0."), ("aggregation.layer.", "pr_dwconv."))
UM_ROWS = (
    ("encoder.mask_token", "mask_token"),
    ("encoder.pos_embed", "pos_embed"),
    ("encoder.patch_embed.", "patch_embed."),
    ("encoder.stages.", "blocks."),
    ("encoder.norm.", "norm."),
    ("head.", "decoder_pred."),
)
BIAS = "encoder.rel_pos_bias"


def build_vit(tensors: Tensors, sizes: Sizes) -> SimMIM:
    """SimMIM on its ViT; without drop path, which no checkpoint tells.

    Raises:
        OfficialError: sizes that do not fit each other.
    """
    widths = (("cls_token", 2), ("mask_token", 2), ("patch_embed.proj.bias", 0))
    dim = one(sizes, "embed_dim", agreed(768, *(shape_of(tensors, f"encoder.{key}", at) for key, at in widths)))
    patch = agreed(16, pixel_side(tensors, "decoder.0"), kernel_side(tensors, "encoder.patch_embed.proj.weight"))
    encoder = RelativeViTConfig(
        patch_size=one(sizes, "patch_size", patch),
        embed_dim=dim,
        depth=one(sizes, "depth", depth_of(tensors, "encoder.blocks")),
        num_heads=one(sizes, "num_heads", heads_of(dim, [shape_of(tensors, f"{BIAS}.{TABLE}", 1)])),
        mlp_ratio=one(sizes, "mlp_ratio", mlp_ratio(tensors, "encoder.blocks.0", dim)),
        drop_path=0.0,
    )
    return _build(
        Config(encoder, bool(sizes["norm_pix_loss"])), stored_grid(tensors) * encoder.patch_size, tensors, sizes
    )


def stored_grid(tensors: Tensors) -> int:
    """Side of the ViT's grid, off the index (1 + side**2, 1 + side**2) and the table of (2 side - 1)**2 + 3 rows."""
    read = [shape_of(tensors, f"{BIAS}.{INDEX}", dim) for dim in (0, 1)]
    rows = shape_of(tensors, f"{BIAS}.{TABLE}", 0)
    offsets = None if rows is None else root(rows - 3)
    sides = [None if tokens is None else root(tokens - 1) for tokens in read]
    return agreed(14, *sides, None if offsets is None else (offsets + 1) // 2)


def build_swin(tensors: Tensors, sizes: Sizes) -> SimMIM:
    """SimMIM on Microsoft's Swin. Raises OfficialError where the sizes do not fit each other."""
    image_size = one(sizes, "img_size", stored_image_size(tensors))
    encoder = swin_config(tensors, sizes, image_size)
    return _build(Config(encoder, bool(sizes["norm_pix_loss"])), image_size, tensors, sizes)


def build_um_swin(tensors: Tensors, sizes: Sizes) -> SimMIM:
    """UM-MAE's SimMIM on its Swin; nothing tells the image's size and the window: 256 and 16 unless given."""
    image_size = one(sizes, "img_size", 256)
    maps = [image_size // TOKEN // 2**s for s in range(4)]
    encoder = um_swin_config(tensors, sizes, maps, default_window=16)
    return _build(Config(encoder, bool(sizes["norm_pix_loss"])), image_size, tensors, sizes)


def build_um_pvt(tensors: Tensors, sizes: Sizes) -> SimMIM:
    """UM-MAE's SimMIM on its PVT; nothing tells the pooling: 8, 4, 2, 1 unless given."""
    image_size = (table_side(tensors, "pos_embed") or 64) * TOKEN
    encoder = pvt_config(tensors, sizes, default_ratios=(8, 4, 2, 1))
    return _build(Config(encoder, bool(sizes["norm_pix_loss"])), image_size, tensors, sizes)


def _build(config: Config, image_size: int, tensors: Tensors, sizes: Sizes) -> SimMIM:
    image_size = one(sizes, "img_size", image_size)
    fitting(config.check_sizes(image_size))
    aggregation, throwing = partial(tensors)
    return SimMIM(image_size, config, aggregation, throwing and config.partial_reconstruction)


def names(model: SimMIM) -> dict[str, str]:
    """{official key: our key}, in the official order."""
    named = reorder(rename(model, ROWS), lambda key: key != "encoder.mask_token")
    return swin_names(named, ("encoder.mask_token", "encoder.patch_embed."))


def vit_constants(model: SimMIM) -> dict[str, Tensor]:
    """Which row of the table each pair of tokens reads: (1 + N, 1 + N) int64."""
    h, w = model.grid
    ids = torch.arange(h * w, device=CPU)[None]
    return {f"{BIAS}.{INDEX}": relative_vit.relative_index(ids, model.grid)[0]}


def vit_unsaid(model: SimMIM) -> str:
    """SimMIM's ViT has relative positions only; AMT's has absolute ones."""
    config: Any = model.encoder.config
    if config.relative_position and not config.absolute_position:
        return ""
    option = "absolute_position = true" if config.absolute_position else "relative_position = false"
    return f"method.encoder.{option}: the official ViT has a table of relative positions, and no other"


def swin_constants(model: Any) -> dict[str, Tensor]:
    """Every block's index (n, n) int64, and every shifted block's mask (nW, n, n)."""
    encoder: Any = model.encoder
    fixed = position_indices(model)
    for s, layer in enumerate(encoder.layers):
        side = encoder.image_size // TOKEN // 2**s
        if layer.window < side:
            mask = shift_mask(side, side, layer.window, layer.window // 2, CPU).to(next(encoder.parameters()).dtype)
            mask = mask + 0.0  # no negative zeros: a saved file is the official one to the byte
            fixed |= {f"encoder.layers.{s}.blocks.{b}.attn_mask": mask for b in range(1, len(layer.blocks), 2)}
    return fixed


def _pixels(key: str) -> bool:
    return key == "decoder.0.weight"


FAMILIES = {
    "simmim_vit": Family(
        SimMIM,
        build_vit,
        VIT_SIZES,
        lambda model: rename(model, ROWS),
        _pixels,
        vit_constants,
        lambda model: isinstance(model.encoder, RelativeViT),
        vit_unsaid,
        norm_pix=False,
    ),
    "simmim_swin": Family(
        SimMIM,
        build_swin,
        SWIN_SIZES,
        names,
        _pixels,
        swin_constants,
        lambda model: isinstance(model.encoder, TableSwin),
        norm_pix=False,
    ),
    "um_simmim_swin": Family(
        SimMIM,
        build_um_swin,
        UM_SWIN_SIZES,
        lambda model: stage_names(model, UM_ROWS),
        pointwise,
        accepts=lambda model: isinstance(model.encoder, Swin),
        norm_pix=False,
    ),
    "um_simmim_pvt": Family(
        SimMIM,
        build_um_pvt,
        UM_PVT_SIZES,
        lambda model: stage_names(model, UM_ROWS),
        pointwise,
        accepts=lambda model: isinstance(model.encoder, PVT),
        norm_pix=False,
    ),
}
