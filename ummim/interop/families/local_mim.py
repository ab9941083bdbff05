"""LocalMIM on ViT and on Swin (huawei-noah's repository). The official behaviour is kept: the Swin's merging order
and its token coordinates are those of the official pre-training.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ummim.backbones.table_swin import UNIT
from ummim.interop.errors import OfficialError
from ummim.interop.families.mae import vit_config, vit_image_size
from ummim.interop.families.table_swin import position_indices, stored_window, swin_config, swin_names
from ummim.interop.family import Family, rename
from ummim.interop.sizes import (
    VIT_SIZES,
    Sizes,
    Tensors,
    agreed,
    depth_of,
    fitting,
    four,
    mlp_ratio,
    one,
    partial,
    shape_of,
    table_side,
)  # fmt: skip
from ummim.methods import local_mim

LOCAL_SIZES = (*VIT_SIZES, "target", "hog_nbins")


def build_vit(tensors: Tensors, sizes: Sizes) -> local_mim.LocalMIMViT:
    """LocalMIM on a ViT of these sizes; ``taps`` are the decoded blocks, from 0.

    Raises:
        OfficialError: sizes that do not fit each other.
    """
    encoder, taps = vit_config(tensors, sizes), sizes.get("taps")
    config = local_mim.Config(
        encoder=encoder,
        decoder=decoders(tensors, sizes, heads=8),
        taps=None if taps is None else tuple(taps),
        **target(tensors, sizes, VIT_PREDICTIONS),
    )
    image_size = vit_image_size(tensors, sizes, encoder.patch_size, "decoder.0.pos_embed")
    fitting(config.check_sizes(image_size))
    return local_mim.LocalMIMViT(image_size, config, *partial(tensors))


def build_swin(tensors: Tensors, sizes: Sizes) -> local_mim.LocalMIMSwin:
    """LocalMIM on a Swin of these sizes. Raises OfficialError where they do not fit each other."""
    tables = [table_side(tensors, f"decoder.{k}.pos_embed") for k in range(4)]
    sides = [side * UNIT // finer if side else None for side, finer in zip(tables, (4, 2, 1, 1), strict=True)]
    image_size = one(sizes, "img_size", agreed(stored_window(tensors, 0) * UNIT, *sides))
    config = local_mim.Config(
        encoder=swin_config(tensors, sizes, image_size),
        decoder=decoders(tensors, sizes, heads=4),
        row_major_merge=True,
        legacy_coordinates=True,
        **target(tensors, sizes, SWIN_PREDICTIONS),
    )
    fitting(config.check_sizes(image_size))
    return local_mim.LocalMIMSwin(image_size, config, *partial(tensors))


def decoders(tensors: Tensors, sizes: Sizes, heads: int) -> local_mim.LocalDecoderConfig:
    """The four decoders' sizes; ``decoder_embed_dim`` is one number or four."""
    places = (("mask_token", 2), ("pos_embed", 2), ("embed.bias", 0))
    read = [agreed(256, *(shape_of(tensors, f"decoder.{k}.{key}", dim) for key, dim in places)) for k in range(4)]
    dims = four(sizes, "decoder_embed_dim", lambda: read, growth=1)
    return local_mim.LocalDecoderConfig(
        embed_dims=dims,
        depth=one(sizes, "decoder_depth", depth_of(tensors, "decoder.0.blocks")),
        num_heads=one(sizes, "decoder_num_heads", heads),
        mlp_ratio=mlp_ratio(tensors, "decoder.0.blocks.0", dims[0]),
    )


def target(tensors: Tensors, sizes: Sizes, predictions: Sequence[str]) -> dict[str, Any]:
    """What is predicted, as keywords of the config. The Sobel filters are part of a checkpoint with HOG targets.

    Raises:
        OfficialError: an unknown target.
    """
    stored = [key for key in tensors if key.startswith("hog_enc.")]
    name = str(sizes.get("target", "hog" if stored else "pixel")).lower()
    if name not in ("hog", "pixel"):
        raise OfficialError(f"target is HOG or Pixel, not {sizes['target']!r}")
    outs = [shape_of(tensors, f"{module}.{leaf}", 0) for module in predictions for leaf in ("weight", "bias")]
    return {
        "target": name,
        "hog_bins": one(sizes, "hog_nbins", agreed(27, *outs) // 3),
        "hog_bias": any(key.endswith(".conv.bias") for key in stored),
        "norm_pix_loss": bool(sizes["norm_pix_loss"]),
    }


def prefixes(encoder: tuple[tuple[str, str], ...], predictions: tuple[str, str, str, str], ours: str) -> list[Any]:
    """Our prefixes and the official ones; the order of the rows is the official order of keys.

    ``predictions`` are the official prefixes of each decoder's prediction, ``ours`` is our own.
    """
    rows = list(encoder)
    for k, prediction in enumerate(predictions):
        mine, theirs = f"decoders.{k}.", f"decoder.{k}."
        rows += [
            (f"{mine}decoder.mask_token", f"{theirs}mask_token"),
            (f"{mine}decoder.pos_embed", f"{theirs}pos_embed"),
            (f"{mine}embed.", f"{theirs}embed."),
            (f"{mine}decoder.blocks.", f"{theirs}blocks."),
            (f"{mine}head.norm.", f"{theirs}norm."),
            (f"{mine}{ours}", f"{theirs}{prediction}"),
            (f"{mine}aggregation.layer.", f"{theirs}pr_dwconv."),  # PR-MIM has no official code: names of our own
        ]
    return rows + [(f"hog.bias_{k}", f"hog_enc.{k}.conv.bias") for k in range(4)]


VIT_PREDICTIONS = tuple(f"decoder.{k}.pred.{layer}" for k, layer in enumerate((4, 1, 0, 1)))  # last layers
SWIN_PREDICTIONS = tuple(f"decoder.{k}.pred" for k in range(4))
VIT_PREFIXES = (
    ("encoder.cls_token", "cls_token"),
    ("encoder.pos_embed", "pos_embed"),
    ("encoder.patch_embed.", "patch_embed."),
    ("encoder.blocks.", "blocks."),
    ("norms.", "norm."),
)
SWIN_PREFIXES = (("encoder.", "encoder."), ("norms.", "encoder.norm."))


def vit_names(model: local_mim.LocalMIMViT) -> dict[str, str]:
    """{official key: our key}, in the official order."""
    coarse = "pred.1."  # the mean of 2x2 tokens is 0
    return rename(model, prefixes(VIT_PREFIXES, ("pred.", "pred.", "pred.", coarse), "head.pred."))


def swin_official_names(model: local_mim.LocalMIMSwin) -> dict[str, str]:
    """{official key: our key}, in the official order."""
    named = rename(model, prefixes(SWIN_PREFIXES, ("pred.",) * 4, "head.pred.0."))
    return swin_names(named, ("encoder.patch_embed.",))


def sobel_filters(model: local_mim.LocalMIM) -> dict[str, Tensor]:
    """The filters of each scale's HOG, (2, 1, 3, 3), where that is the target."""
    if model.hog is None:
        return {}
    across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    filters = torch.stack([across, across.T])[:, None].to(next(model.parameters()).dtype)
    return {f"hog_enc.{k}.conv.weight": filters.clone() for k in range(4)}


FAMILIES = {
    "local_mim_vit": Family(
        local_mim.LocalMIMViT,
        build_vit,
        (*LOCAL_SIZES, "taps"),
        vit_names,
        pointwise=lambda key: ".pred." in key,
        constants=sobel_filters,
    ),
    "local_mim_swin": Family(
        local_mim.LocalMIMSwin,
        build_swin,
        (*LOCAL_SIZES, "window_size"),
        swin_official_names,
        constants=lambda model: {**position_indices(model), **sobel_filters(model)},
    ),
}
