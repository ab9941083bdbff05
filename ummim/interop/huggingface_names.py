"""Our tensors under the names of the Hugging Face hub, and back.

The names are those of the checkpoints on the hub, such as ``vit.encoder.layer.0.attention.attention.query.weight``,
which every release of transformers reads, whatever its own modules are called.
"""

import re
from collections.abc import Iterable, Mapping
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from ummim.backbones.table_swin import relative_index

Theirs = tuple[str | None, ...]  # the parts of one tensor of ours, row block after row block; None: zeros, not stored

IN_BLOCKS = (
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("attn.proj.", "attention.output.dense."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
    ("gamma_", "lambda_"),
)
EMBEDDING = (
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("patch_embed.norm.", "embeddings.norm."),
    ("norm.", "layernorm."),
    ("rel_pos_bias.", "encoder.relative_position_bias."),
)
MAE_DECODER = (
    ("embed.", "decoder.decoder_embed."),
    ("decoder.mask_token", "decoder.mask_token"),
    ("decoder.pos_embed", "decoder.decoder_pos_embed"),
    ("head.norm.", "decoder.decoder_norm."),
    ("head.pred.", "decoder.decoder_pred."),
)


class Kind(NamedTuple):
    """How a family of transformers' models spells its blocks.

    Attributes:
        attention: where queries, keys and values are.
        key_bias: keys have a bias. BEiT's have none: it adds the same to a query's logits for all keys, which softmax
            takes out, so leaving it out changes nothing.
        block: the prefix of a block, by the stage's and the block's number.
    """

    attention: str
    key_bias: bool
    block: str


VIT = Kind("attention.attention", True, "encoder.layer.{block}.")
BEIT = Kind("attention.attention", False, "encoder.layer.{block}.")
SWIN = Kind("attention.self", True, "encoder.layers.{stage}.blocks.{block}.")

_BLOCK = re.compile(r"(?:layers\.(?P<stage>\d+)\.)?blocks\.(?P<block>\d+)\.")
_MERGE = re.compile(r"layers\.(\d+)\.downsample\.")


def encoder_names(keys: Iterable[str], kind: Kind) -> dict[str, Theirs]:
    """{our key of an encoder: the names of its parts}, without a model's prefix.

    Raises:
        KeyError: a key that the family has no name for.
    """
    return {key: _encoder_name(key, kind) for key in keys}


def mae_names(keys: Iterable[str]) -> dict[str, Theirs]:
    """{our key of an MAE: the names of its parts in ``ViTMAEForPreTraining``}; an aggregation has none.

    Raises:
        KeyError: a key that the class has no name for.
    """
    names: dict[str, Theirs] = {}
    for key in keys:
        if key.startswith("encoder."):
            names |= prefixed("vit.", {key: _encoder_name(key.removeprefix("encoder."), VIT)})
        elif match := re.match(r"decoder\.blocks\.(\d+)\.", key):
            names[key] = _in_block(f"decoder.decoder_layers.{match[1]}.", key[match.end() :], VIT)
        elif not key.startswith("aggregation."):
            names[key] = (_renamed(key, MAE_DECODER),)
    return names


def swin_indices(tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The index that transformers 4 keeps beside each of a Swin's tables, and 5 ignores: (n, n) int64."""
    indices = {}
    for key, table in tables.items():
        if key.endswith(f".{SWIN.attention}.relative_position_bias_table"):
            window = (isqrt(len(table)) + 1) // 2
            indices[key.replace("bias_table", "index")] = relative_index(window, table.device)
    return indices


def prefixed(prefix: str, names: Mapping[str, Theirs]) -> dict[str, Theirs]:
    """The same names below ``prefix``."""
    return {key: tuple(part if part is None else prefix + part for part in parts) for key, parts in names.items()}


def simmim_names() -> dict[str, Theirs]:
    """SimMIM's head, a 1x1 convolution in ``SwinForMaskedImageModeling``."""
    return {f"head.{leaf}": (f"decoder.0.{leaf}",) for leaf in ("weight", "bias")}


def to_theirs(tensors: Mapping[str, Tensor], names: Mapping[str, Theirs]) -> dict[str, Tensor]:
    """Our tensors, cut into the named parts."""
    cut: dict[str, Tensor] = {}
    for key, parts in names.items():
        for name, rows in zip(parts, tensors[key].chunk(len(parts)), strict=True):
            if name is not None:
                cut[name] = rows.contiguous()
    return cut


def from_theirs(tensors: Mapping[str, Tensor], names: Mapping[str, Theirs]) -> tuple[dict[str, Tensor], list[str]]:
    """Our tensors, joined from their parts, and what is left over. A tensor of which a part is missing is left out."""
    joined: dict[str, Tensor] = {}
    left = dict.fromkeys(tensors)
    for key, parts in names.items():
        stored = [part for part in parts if part is not None]
        if all(part in tensors for part in stored):
            zeros = torch.zeros_like(tensors[stored[0]])
            joined[key] = torch.cat([zeros if part is None else tensors[part] for part in parts])
            for part in stored:
                left.pop(part, None)
    return joined, list(left)


def _encoder_name(key: str, kind: Kind) -> Theirs:
    if match := _BLOCK.match(key):
        return _in_block(kind.block.format(**match.groupdict()), key[match.end() :], kind)
    if match := _MERGE.match(key):  # theirs merge at the end of a stage, ours before the next one
        return (f"encoder.layers.{int(match[1]) - 1}.downsample.{key[match.end() :]}",)
    return (_renamed(key, EMBEDDING),)


def _in_block(prefix: str, key: str, kind: Kind) -> Theirs:
    attention = f"{prefix}{kind.attention}"
    if key == "attn.qkv.weight":
        return tuple(f"{attention}.{part}.weight" for part in ("query", "key", "value"))
    if key == "attn.qkv.bias":
        parts: tuple[str | None, ...] = ("query", "key" if kind.key_bias else None, "value")
        return tuple(None if part is None else f"{attention}.{part}.bias" for part in parts)
    if match := re.fullmatch(r"attn\.([qv])_bias", key):
        return (f"{attention}.{'query' if match[1] == 'q' else 'value'}.bias",)
    if key == "attn.relative_position_bias_table":
        return (f"{attention}.relative_position_bias_table",)
    if key.startswith("rel_pos_bias."):  # of each block, in fine-tuning
        return (f"{attention}.relative_position_bias.{key.removeprefix('rel_pos_bias.')}",)
    return (prefix + _renamed(key, IN_BLOCKS),)


def _renamed(key: str, rows: Iterable[tuple[str, str]]) -> str:
    for ours, theirs in rows:
        if key.startswith(ours):
            return theirs + key[len(ours) :]
    raise KeyError(key)
