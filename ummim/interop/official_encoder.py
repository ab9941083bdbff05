"""The encoder of an official file without its decoder, and what such a file holds."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ummim.backbones.sparse_swin import PatchMerging
from ummim.downstream.adapt import Pretrained
from ummim.interop.classifier import CLASSIFIERS
from ummim.interop.official import FAMILIES, assign, check_keys
from ummim.interop.sizes import SPELLINGS, collect_sizes, depth_of, one


def encoder_of(
    family: str, tensors: Mapping[str, Tensor], args: Mapping[str, Any], sizes: Mapping[str, Any]
) -> tuple[Pretrained, set[str]]:
    """The encoder of the family's model, and the official keys that it uses; the decoder, which many published files
    lack, is not looked at. Raises OfficialError."""
    kind = FAMILIES[family]
    collected = collect_sizes(family, kind.sizes, sizes, args, kind.norm_pix)
    collected.setdefault("decoder_num_heads", 1)  # which fits every decoder
    if "taps" in kind.sizes:  # no part of the encoder: any that its depth allows
        depth = max(depth_of(tensors, prefix) for prefix in ("blocks", "backbone.layers"))
        collected["taps"] = tuple(range(one(collected, "depth", depth)))[-4:]
    with torch.device("meta"):  # shapes only
        model: Any = kind.build(tensors, collected)
    names = {official: ours for official, ours in kind.names(model).items() if ours.startswith("encoder.")}
    own, sections = model.state_dict(), {_section(key) for key in names}
    fixed = {key for key in kind.constants(model) if _section(key) in sections}
    given = {key: value for key, value in tensors.items() if _section(key) in sections and key not in fixed}
    check_keys(f"{family}'s encoder", given, {key: kind.shape(key, own[ours].shape) for key, ours in names.items()})
    assign(model.encoder, tensors, {key: ours.removeprefix("encoder.") for key, ours in names.items()})
    return model.encoder, {*names, *fixed}


def _section(key: str) -> str:
    """The part of a model that an official key belongs to, such as ``blocks`` or ``encoder.layers``."""
    parts = key.split(".")
    return ".".join(parts[: 2 if parts[0] in ("encoder", "backbone") else 1])


def is_size(family: str, name: str) -> bool:
    """Whether a fine-tuned model of the family has this size, too."""
    return SPELLINGS.get(name, name) in CLASSIFIERS[family].sizes


def has_decoder(family: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether any tensor is of what an official encoder's file lacks."""
    parts = ("decoder", "mask_token", "neck.", "hog_enc")
    return any(key.startswith(parts) for key in tensors if not (family.startswith("um_simmim") and key == "mask_token"))


def order_merges(encoder: Any, certificate: Mapping[str, Any]) -> None:
    """Take the order of 2x2 tokens from an official file's certificate: of an export of ours, it may be the
    official fine-tuning's, which the tensors do not tell."""
    certified = certificate.get("recipe", {}).get("method", {})
    if "row_major_merge" in certified:
        for module in encoder.modules():
            if isinstance(module, PatchMerging):
                module.row_major = bool(certified["row_major_merge"])
