"""Encoders in files of timm's: the state dict of a ViT, a BEiT or a Swin, whose names are ours."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ummim.backbones.relative_vit import RelativeViTConfig
from ummim.backbones.table_swin import TableSwinConfig
from ummim.errors import UserError
from ummim.interop.errors import OfficialError
from ummim.interop.families.mae import vit_config, vit_image_size
from ummim.interop.families.table_swin import stored_image_size, swin_config
from ummim.interop.foreign import Foreign, fill_in, foreign_encoder
from ummim.interop.sizes import heads_of, root, shape_of
from ummim.interop.timm import TIMM_VITS

TABLE = "relative_position_bias_table"
FIXED = ("relative_position_index", "attn_mask", "k_bias")  # which timm's models compute, older releases' stored
HEADS = ("head.", "head_drop.", "fc_norm.", "pre_logits.")  # of classifiers
VIT_EPS, SWIN_EPS = 1e-6, 1e-5


def is_timm(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are names of a timm ViT, BEiT or Swin."""
    return "blocks.0.attn.qkv.weight" in tensors or f"layers.0.blocks.0.attn.{TABLE}" in tensors


def from_timm(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> Foreign:
    """The encoder of a timm model's state dict; a head is left over.

    Sizes are read off the tensors. Where they do not tell, ``kwargs`` in the metadata do (``ummim export --format
    timm`` writes them); else heads are those of timm's model of these sizes or 64 wide, and a Swin's images the
    smallest of which the last stage is one window.

    Raises:
        UserError: names of another model, or tensors that do not fit each other.
    """
    kwargs = json.loads(metadata.get("kwargs", "{}"))
    held = {key: tensor for key, tensor in tensors.items() if not key.endswith(FIXED)}
    left = [key for key in held if key.startswith(HEADS)]
    held = {key: tensor for key, tensor in held.items() if key not in left}
    try:
        if f"layers.0.blocks.0.attn.{TABLE}" in held:
            what, (config, image_size) = "timm Swin", _swin(held, kwargs, where)
        elif "blocks.0.attn.q_bias" in held:
            what, held = "timm BEiT", _renamed(held)
            config, image_size = _beit(held, kwargs)
        else:
            what, (config, image_size) = "timm ViT", _vit(held, kwargs)
    except OfficialError as error:
        raise UserError(f"{where}: {error}") from None
    eps = float(metadata.get("norm_eps", SWIN_EPS if what == "timm Swin" else VIT_EPS))
    encoder = foreign_encoder(config, image_size, held.__contains__, eps, where)
    fill_in(encoder, held, f"{where}: read as a {what}")
    return Foreign(what, encoder, {}, left)


def _vit(tensors: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> tuple[Any, int]:
    config = vit_config(tensors, _heads(tensors, kwargs))
    return config, vit_image_size(tensors, {}, config.patch_size)


def _heads(tensors: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """``num_heads``, where it is known."""
    if "num_heads" in kwargs:
        return {"num_heads": kwargs["num_heads"]}
    told = vit_config(tensors, {})
    size = (told.patch_size, told.embed_dim, told.depth)
    known = [heads for *sizes, heads in TIMM_VITS if tuple(sizes) == size]
    return {"num_heads": known[0]} if known else {}


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names of a BEiT's tensors; where its branches have no factors, with factors of 1."""
    ours = {key.replace(f".attn.{TABLE}", f".rel_pos_bias.{TABLE}"): tensor for key, tensor in tensors.items()}
    if "blocks.0.gamma_1" not in ours:
        biases = [(key.removesuffix("attn.q_bias"), value) for key, value in ours.items() if key.endswith("q_bias")]
        ours |= {f"{block}gamma_{i}": torch.ones_like(bias) for block, bias in biases for i in (1, 2)}
    return ours


def _beit(tensors: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> tuple[Any, int]:
    vit = vit_config(tensors, {})
    tables = [tensors[key] for key in (f"rel_pos_bias.{TABLE}", f"blocks.0.rel_pos_bias.{TABLE}") if key in tensors]
    offsets = root(len(tables[0]) - 3) if tables else None
    heads = heads_of(vit.embed_dim, [tables[0].shape[1]]) if tables else _heads(tensors, kwargs).get("num_heads")
    config = RelativeViTConfig(
        patch_size=vit.patch_size,
        embed_dim=vit.embed_dim,
        depth=vit.depth,
        num_heads=heads or vit.num_heads,
        mlp_ratio=vit.mlp_ratio,
        drop_path=0.0,
        relative_position=bool(tables),
        absolute_position="pos_embed" in tensors,
    )
    side = vit_image_size(tensors, {}, vit.patch_size) if offsets is None else (offsets + 1) // 2 * vit.patch_size
    return config, side


def _swin(tensors: Mapping[str, Tensor], kwargs: Mapping[str, Any], where: str) -> tuple[TableSwinConfig, int]:
    if "layers.0.downsample.reduction.weight" in tensors:
        raise UserError(
            f"{where}: its merges are named as in Microsoft's code, not timm's: name the family of the official file, "
            "such as simmim_swin"
        )
    if (patch := shape_of(tensors, "patch_embed.proj.weight", 2)) != 4:
        raise UserError(f"{where}: a Swin on patches of {patch} pixels; those of 4 are supported")
    below = {f"encoder.{key}": tensor for key, tensor in tensors.items()}
    image_size = int(kwargs.get("img_size", stored_image_size(below)))
    sizes = {"window_size": kwargs["window_size"]} if "window_size" in kwargs else {}
    return swin_config(below, sizes, image_size), image_size
