"""implus/UM-MAE: UM-MAE on ViT, Swin and PVT. The official behaviour is kept, the pyramids' decoder order included."""

import re
from collections.abc import Sequence
from typing import Any

from ummim.backbones.pvt import PVT, PVTConfig
from ummim.backbones.pyramid import MASK_PATCH, TOKEN
from ummim.backbones.swin import Swin, SwinConfig
from ummim.backbones.vit import ViT
from ummim.interop.errors import OfficialError
from ummim.interop.families.mae import PREFIXES, vit_config, vit_image_size
from ummim.interop.family import Family, rename, reorder
from ummim.interop.sizes import (
    VIT_SIZES,
    Four,
    Sizes,
    Tensors,
    agreed,
    check_patch,
    decoder,
    depth_of,
    doubling,
    fitting,
    four,
    heads_of,
    mlp_ratio,
    one,
    partial,
    shape_of,
    table_side,
    window,
)  # fmt: skip
from ummim.methods import um_mae

UM_SIZES = (*VIT_SIZES, "vis_mask_ratio")
SWIN_SIZES = (*UM_SIZES, "window_size", "posmlp_dim")
PVT_SIZES = (*UM_SIZES, "sr_ratios")

SECONDARY = ("encoder.vis_mask_token", "vis_mask_token")
FLAT = (SECONDARY, *PREFIXES)
STAGES = tuple((ours.replace("encoder.blocks.", "encoder.stages."), official) for ours, official in FLAT)


def build_vit(tensors: Tensors, sizes: Sizes) -> um_mae.UMMAE:
    """UM-MAE on ViT of these sizes. Raises OfficialError where they do not fit each other."""
    config = um_mae.Config(
        encoder=vit_config(tensors, sizes),
        decoder=decoder(tensors, sizes),
        norm_pix_loss=bool(sizes["norm_pix_loss"]),
    )
    return _build(config, vit_image_size(tensors, sizes, config.patch_size), tensors, sizes)


def build_swin(tensors: Tensors, sizes: Sizes) -> um_mae.UMMAE:
    """UM-MAE on Swin of these sizes. Raises OfficialError where they do not fit each other."""
    image_size = _image_size(tensors, sizes)
    config = um_mae.Config(
        encoder=swin_config(tensors, sizes, [image_size // (2 * TOKEN * 2**s) for s in range(4)], default_window=8),
        decoder=decoder(tensors, sizes),
        norm_pix_loss=bool(sizes["norm_pix_loss"]),
        legacy_decoder_order=True,
    )
    return _build(config, image_size, tensors, sizes)


def build_pvt(tensors: Tensors, sizes: Sizes) -> um_mae.UMMAE:
    """UM-MAE on PVT of these sizes. Raises OfficialError where they do not fit each other."""
    config = um_mae.Config(
        encoder=pvt_config(tensors, sizes, default_ratios=(4, 2, 1, 1)),
        decoder=decoder(tensors, sizes),
        norm_pix_loss=bool(sizes["norm_pix_loss"]),
        legacy_decoder_order=True,
    )
    return _build(config, _image_size(tensors, sizes), tensors, sizes)


def _image_size(tensors: Tensors, sizes: Sizes) -> int:
    """Side of a pyramid's images, from the position tables: the decoder's, and a PVT's own, which is 4 times finer."""
    fine = table_side(tensors, "pos_embed")
    side = agreed(16, table_side(tensors, "decoder_pos_embed"), fine // 4 if fine else None)
    return one(sizes, "img_size", side * MASK_PATCH)


def _build(config: um_mae.Config, image_size: int, tensors: Tensors, sizes: Sizes) -> um_mae.UMMAE:
    fitting(config.check_sizes(image_size))
    secondary = one(sizes, "vis_mask_ratio", float("vis_mask_token" in tensors)) > 0
    return um_mae.UMMAE(image_size, config, *partial(tensors), secondary=secondary)


def swin_config(tensors: Tensors, sizes: Sizes, maps: Sequence[int], default_window: int) -> SwinConfig:
    """The sizes of UM-MAE's Swin, from the official keys; ``maps`` are the sides of its stages' maps."""
    check_patch(sizes, TOKEN, MASK_PATCH)
    widths = [shape_of(tensors, f"patch_embed.{key}", 0) for key in ("proj.weight", "proj.bias", "norm.weight")]
    dim = doubling(sizes, agreed(96, *widths))
    depths = four(sizes, "depth", lambda: stage_depths(tensors), growth=1)
    mlps = [[f"blocks.{b}.attn.posmlp" for b in blocks] for blocks in stage_blocks(depths)]
    heads = [
        heads_of(
            dim * 2**s, (shape_of(tensors, f"{mlp}.2.{leaf}", 0) for mlp in mlps[s] for leaf in ("weight", "bias"))
        )
        for s in range(4)
    ]
    hidden = (("0.weight", 0), ("0.bias", 0), ("2.weight", 1))
    pos_mlp_dim = agreed(32, *(shape_of(tensors, f"blocks.0.attn.posmlp.{key}", at) for key, at in hidden))
    return SwinConfig(
        embed_dim=dim,
        depths=depths,
        num_heads=four(sizes, "num_heads", lambda: heads),
        window_size=window(sizes, maps, default_window),
        mlp_ratio=one(sizes, "mlp_ratio", mlp_ratio(tensors, f"blocks.{sum(depths[:3])}", 8 * dim)),
        pos_mlp_dim=one(sizes, "posmlp_dim", pos_mlp_dim),
    )


def pvt_config(tensors: Tensors, sizes: Sizes, default_ratios: Four) -> PVTConfig:
    """The sizes of UM-MAE's PVT, from the official keys; heads are 64 wide unless given."""
    check_patch(sizes, TOKEN, MASK_PATCH)
    depths = four(sizes, "depth", lambda: stage_depths(tensors), growth=1)
    first = [f"blocks.{sum(depths[:s])}" for s in range(4)]  # block of each stage
    norms = ("norm1.weight", "norm1.bias", "norm2.weight")
    read = [agreed(64 * 2**s, *(shape_of(tensors, f"{first[s]}.{norm}", 0) for norm in norms)) for s in range(4)]
    dims = four(sizes, "embed_dim", lambda: read)
    ratios = [mlp_ratio(tensors, block, dim) for block, dim in zip(first, dims, strict=True)]
    return PVTConfig(
        embed_dims=dims,
        depths=depths,
        num_heads=four(sizes, "num_heads", lambda: [max(1, dim // 64) for dim in dims]),
        mlp_ratios=four(sizes, "mlp_ratio", lambda: ratios, growth=1),
        sr_ratios=four(sizes, "sr_ratios", lambda: default_ratios, growth=1),
    )


def stage_blocks(depths: Sequence[int]) -> list[range]:
    """The numbers of each stage's blocks in the official list."""
    return [range(sum(depths[:s]), sum(depths[: s + 1])) for s in range(4)]


def stage_depths(tensors: Tensors) -> Four:
    """Blocks per stage: the first block of a later stage owns a downsample."""
    found = {int(match[1]) for key in tensors if (match := re.match(r"blocks\.(\d+)\.downsample\.", key))}
    starts = [0, *sorted(found), depth_of(tensors, "blocks")]
    if len(starts) != 5:
        at = [f"blocks.{block}.downsample" for block in sorted(found)]
        raise OfficialError(f"missing or left-over keys: the downsample of three blocks marks the stages, not {at}")
    return tuple(end - start for start, end in zip(starts, starts[1:], strict=False))  # type: ignore[return-value]


def stage_names(model: Any, rows: Sequence[tuple[str, str]] = STAGES) -> dict[str, str]:
    """Official blocks are one list through all stages, the merge before a stage belonging to its first block."""
    starts = [0]
    for stage in model.encoder.stages:
        starts.append(starts[-1] + len(stage.blocks))

    def flat(name: str) -> str:
        match = re.match(r"blocks\.(\d+)\.(?:blocks\.(\d+)\.|merge\.)", name)
        if match is None:
            return name
        block = starts[int(match[1])] + int(match[2] or 0)
        return f"blocks.{block}.{'' if match[2] else 'downsample.'}{name[match.end() :]}"

    def place(name: str) -> tuple[int, int, bool]:
        match = re.match(r"blocks\.(\d+)\.(downsample\.)?", name)
        row = next(i for i, (_, prefix) in enumerate(rows) if name.startswith(prefix))
        return (row, int(match[1]), bool(match[2])) if match else (row, 0, False)

    return reorder({flat(official): ours for official, ours in rename(model, rows).items()}, place)


def pointwise(key: str) -> bool:
    """Swin's position MLPs and PVT's mixing of pooled tokens are 1x1 convolutions in the official code."""
    return ".attn.posmlp." in key or ".attn.sr." in key


FAMILIES = {
    "um_mae_vit": Family(
        um_mae.UMMAE,
        build_vit,
        UM_SIZES,
        lambda model: rename(model, FLAT),
        accepts=lambda model: isinstance(model.encoder, ViT),
    ),
    "um_mae_swin": Family(
        um_mae.UMMAE,
        build_swin,
        SWIN_SIZES,
        stage_names,
        pointwise,
        accepts=lambda model: isinstance(model.encoder, Swin),
    ),
    "um_mae_pvt": Family(
        um_mae.UMMAE,
        build_pvt,
        PVT_SIZES,
        stage_names,
        pointwise,
        accepts=lambda model: isinstance(model.encoder, PVT),
    ),
}
