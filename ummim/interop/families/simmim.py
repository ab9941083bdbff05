"""microsoft/SimMIM on ViT and Swin, and implus/UM-MAE's SimMIM baselines on Swin and PVT."""

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ummim.backbones import relative_vit, table_swin
from ummim.backbones.pvt import PVT
from ummim.backbones.pyramid import TOKEN
from ummim.backbones.relative_vit import RelativeViT, RelativeViTConfig
from ummim.backbones.swin import Swin
from ummim.backbones.table_swin import TableSwin
from ummim.backbones.window import shift_mask
from ummim.interop.families.green_mim import swin_config, swin_names
from ummim.interop.families.um_mae import pointwise, pvt_config, stage_names
from ummim.interop.families.um_mae import swin_config as um_swin_config
from ummim.interop.family import Family, rename, reorder
from ummim.interop.sizes import Sizes, Tensors, depth_of, fitting, mlp_ratio, one, partial, shape_of
from ummim.methods.simmim import Config, SimMIM

VIT_SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "norm_pix_loss")
SWIN_SIZES = (*VIT_SIZES, "window_size")
UM_SWIN_SIZES = (*SWIN_SIZES, "posmlp_dim")
UM_PVT_SIZES = (*VIT_SIZES, "sr_ratios")
CPU = torch.device("cpu")

# Our prefixes and the official ones; the order of the rows is the official order of keys.
ROWS = (("encoder.", "encoder."), ("head.", "decoder.0."), ("aggregation.dwconv.", "pr_dwconv."))
UM_ROWS = (
    ("encoder.mask_token", "mask_token"),
    ("encoder.pos_embed", "pos_embed"),
    ("encoder.patch_embed.", "patch_embed."),
    ("encoder.stages.", "blocks."),
    ("encoder.norm.", "norm."),
    ("head.", "decoder_pred."),
)
INDEX = "relative_position_index"


def build_vit(tensors: Tensors, sizes: Sizes) -> SimMIM:
    """SimMIM on its ViT; without drop path, which no checkpoint tells. Raises ValueError for sizes that do not fit."""
    dim = one(sizes, "embed_dim", shape_of(tensors, "encoder.cls_token", 2, 768))
    table = "encoder.rel_pos_bias.relative_position_bias_table"
    encoder = RelativeViTConfig(
        patch_size=one(sizes, "patch_size", shape_of(tensors, "encoder.patch_embed.proj.weight", 2, 16)),
        embed_dim=dim,
        depth=one(sizes, "depth", depth_of(tensors, "encoder.blocks")),
        num_heads=one(sizes, "num_heads", shape_of(tensors, table, 1, max(1, dim // 64))),
        mlp_ratio=one(sizes, "mlp_ratio", mlp_ratio(tensors, "encoder.blocks.0", dim)),
        drop_path=0.0,
    )
    side = _side(shape_of(tensors, table, 0, 27**2 + 3) - 3)
    return _build(Config(encoder, bool(sizes["norm_pix_loss"])), side * encoder.patch_size, tensors, sizes)


def build_swin(tensors: Tensors, sizes: Sizes) -> SimMIM:
    """SimMIM on Microsoft's Swin. Raises ValueError where the sizes do not fit each other.

    The image's size is that of the first stage's shifted windows, 192 where there are none, unless given.
    """
    side = _side(shape_of(tensors, "encoder.layers.0.blocks.0.attn.relative_position_bias_table", 0, 11**2))
    windows = shape_of(tensors, "encoder.layers.0.blocks.1.attn_mask", 0, (192 // TOKEN // side) ** 2)
    image_size = one(sizes, "img_size", isqrt(windows) * side * TOKEN)
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
    image_size = isqrt(shape_of(tensors, "pos_embed", 1, 64**2)) * TOKEN
    encoder = pvt_config(tensors, sizes, default_ratios=(8, 4, 2, 1))
    return _build(Config(encoder, bool(sizes["norm_pix_loss"])), image_size, tensors, sizes)


def _build(config: Config, image_size: int, tensors: Tensors, sizes: Sizes) -> SimMIM:
    image_size = one(sizes, "img_size", image_size)
    fitting(config.check_sizes(image_size))
    throwing = config.partial_reconstruction and partial(tensors)[1]
    return SimMIM(image_size, config, partial(tensors)[0], throwing)


def _side(rows: int) -> int:
    """Side of the window whose table of relative positions has (2 side - 1)**2 rows."""
    return (isqrt(rows) + 1) // 2


def names(model: SimMIM) -> dict[str, str]:
    """{official key: our key}, in the official order."""
    return reorder(swin_names(rename(model, ROWS)), lambda key: key != "encoder.mask_token")


def vit_constants(model: SimMIM) -> dict[str, Tensor]:
    """Which row of the table each pair of tokens reads: (1 + N, 1 + N) int64."""
    h, w = model.grid
    ids = torch.arange(h * w, device=CPU)[None]
    return {f"encoder.rel_pos_bias.{INDEX}": relative_vit.relative_index(ids, model.grid)[0]}


def swin_constants(model: SimMIM) -> dict[str, Tensor]:
    """Every block's index (n, n) int64, and every shifted block's mask (nW, n, n)."""
    encoder: Any = model.encoder
    fixed: dict[str, Tensor] = {}
    for s, layer in enumerate(encoder.layers):
        side = encoder.image_size // TOKEN // 2**s
        index = table_swin.relative_index(layer.window, CPU)
        mask = shift_mask(side, side, layer.window, layer.window // 2, CPU) if layer.window < side else None
        for b in range(len(layer.blocks)):
            fixed[f"encoder.layers.{s}.blocks.{b}.attn.{INDEX}"] = index
            if b % 2 and mask is not None:
                fixed[f"encoder.layers.{s}.blocks.{b}.attn_mask"] = mask.to(encoder.mask_token.dtype)
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
