"""Weights to start from: any format of ours or of others into a method, for continued pre-training.

Tensors are brought under our method's names, in the order of its merges, and copied where they fit.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ummim.backbones.pvt import PVT, PVTConfig
from ummim.backbones.pyramid import TOKEN
from ummim.backbones.swin import Swin, SwinConfig
from ummim.backbones.table_swin import TableSwinConfig
from ummim.backbones.vit import ViT
from ummim.checkpoint_file import listed
from ummim.downstream.adapt import Pretrained, image_size_of
from ummim.downstream.relative_vit import BlockwiseViT, blocks_tables
from ummim.errors import UserError
from ummim.interop.official import FAMILIES
from ummim.interop.official_sizes import official_sizes
from ummim.interop.source import Source, decoder_heads, read_source
from ummim.interop.timm import merges_by_rows, turn_merges
from ummim.methods.api import Method

CLASS_TOKEN, CLASS_MLP = "encoder.cls_token", "encoder.cls_token_mlp."
SHARED_TABLE = "encoder.rel_pos_bias.relative_position_bias_table"
BLOCKS = ("encoder.blocks.", "encoder.layers.", "encoder.stages.")
OPTIONAL = ("encoder.mask_token", "encoder.vis_mask_token", "encoder.norm.")  # which not all methods have
OTHERS = "or start from other weights"


class Report(NamedTuple):
    """What became of the tensors of a file.

    Attributes:
        source: what was read.
        used: keys of the method that were loaded.
        missing: keys of the method that the file does not have: they keep their fresh values.
        left_over: keys of the file that the method has no place for.
    """

    source: str
    used: tuple[str, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]

    def line(self) -> str:
        """One line for the log."""
        parts = [f"{len(self.used)} tensors of {self.source} loaded"]
        for what, keys in (("fresh, as it has none of them", self.missing), ("left over there", self.left_over)):
            parts.append(f"{what}: {len(keys)} ({listed(keys, 6)})" if keys else f"{what}: none")
        return "; ".join(parts)


def load_init(method: Method, path: str | Path, family: str | None = None) -> Report:
    """Copy the weights of ``path`` into ``method``, encoder and, where they are there, all else that fits by name.

    Args:
        method: the method, on any device; a frozen teacher is left alone.
        path: whatever :func:`ummim.interop.source.read_source` reads.
        family: of an official file.

    Raises:
        UserError: nothing there, an unknown format, another encoder (of another kind, or with other heads, windows,
            pooling or blocks), a decoder with other heads, or tensors of another shape.
        OSError: a file that cannot be opened.
    """
    sizes = official_sizes(method, family) if family in FAMILIES else {}
    source = read_source(Path(path), family, sizes, whole=True)
    for key, theirs, ours in _differences(method.encoder, source.encoder):
        if key.rpartition(".")[2] in source.untold:
            continue
        remedy = "take a recipe with such an encoder" if key.endswith("kind") else f"set it to {theirs}"
        raise UserError(f"{path}: {key} is {theirs} in {source.what} and {ours} in this recipe: {remedy}, {OTHERS}")
    tensors, left = _tensors(method, source), list(source.left)
    if _passes_mlp(method.state_dict()) and not _passes_mlp(tensors):  # a plain class token is no input of TEC's MLP
        left += [key for key in (CLASS_TOKEN,) if tensors.pop(key, None) is not None]
    own = {key: value for key, value in method.state_dict().items() if not _is_frozen(method, key)}
    used = [key for key in own if key in tensors]
    _check(f"{path}: {source.what}", own, tensors)
    theirs, ours = source.decoder_heads, decoder_heads(method)
    if None not in (theirs, ours) and theirs != ours and any(key.startswith("decoder") for key in used):
        raise UserError(
            f"{path}: method.decoder.num_heads is {theirs} in {source.what} and {ours} in this recipe: set it to "
            f"{theirs}, or start from a file of the encoder alone (ummim export)"
        )
    with torch.no_grad():
        for key in used:
            own[key].copy_(tensors[key])
    left += [key for key in tensors if key not in own]
    missing = tuple(key for key in own if key not in tensors)
    what = f"{source.what} of {path}" if source.form == "run" else f"{source.what} {path}"
    return Report(what, tuple(used), missing, tuple(left))


def _check(what: str, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError for tensors of an encoder that one of the two lacks, and for tensors of another shape."""
    extra = [key for key in tensors if key.startswith("encoder.") and key not in own]
    if strange := [key for key in extra if not key.startswith(OPTIONAL)]:
        raise UserError(
            f"{what} has tensors that this recipe's encoder has no place for: {listed(strange, 4)}; give "
            f"method.encoder the options of those weights, {OTHERS}"
        )
    if lacking := [key for key in own if key.startswith(BLOCKS) and key not in tensors]:
        raise UserError(
            f"{what} lacks tensors of this recipe's encoder: {listed(lacking, 4)}; give method.encoder the options of "
            f"those weights, {OTHERS}"
        )
    for key in own:
        if key in tensors and tensors[key].shape != own[key].shape:
            remedy = "" if key.startswith("encoder.") else ", or start from a file of the encoder alone (ummim export)"
            raise UserError(
                f"{what}: {key} is {tuple(tensors[key].shape)} there and {tuple(own[key].shape)} in this recipe: "
                f"give the recipe the sizes of those weights{remedy}"
            )


def _differences(ours: Any, theirs: Any) -> Iterable[tuple[str, Any, Any]]:
    """(key of a recipe, there, here) of what makes two encoders compute differently though tensors may fit."""
    for name in ("kind", "depth", "depths", "num_heads"):
        here, there = _option(ours, name), _option(theirs, name)
        if here != there:
            yield f"method.encoder.{name}", there, here
    config, scale = ours.config, _widened(ours)  # a recipe's sizes are those on the compact grid
    if isinstance(config, SwinConfig | TableSwinConfig):
        mine, other = _window(ours), _window(theirs)
        if mine != other and mine * image_size_of(theirs) != other * image_size_of(ours):  # windows grow with images
            yield "method.encoder.window_size", f"{other / scale:g}", config.window_size
    if isinstance(config, PVTConfig) and (pooling := _pooling(theirs)) != _pooling(ours):
        yield "method.encoder.sr_ratios", [*(ratio // scale for ratio in pooling[:3]), pooling[3]], [*config.sr_ratios]


def _option(encoder: Pretrained, name: str) -> Any:
    value = getattr(encoder.config, name, None)
    return list(value) if isinstance(value, tuple) else value


def _widened(encoder: Pretrained) -> int:
    """How many tokens of a whole image a token of the encoder's map stands for, along a side: 2 on a compact grid."""
    return 2 if isinstance(encoder, Swin | PVT) and encoder.hiding == "compact" else 1


def _window(encoder: Any) -> int:
    """Side of a Swin's windows, in tokens of a whole image; a map no larger is one window."""
    return min(_widened(encoder) * encoder.config.window_size, image_size_of(encoder) // TOKEN)


def _pooling(encoder: Any) -> list[int]:
    """A PVT's ratios on a whole image; the last stage's are those of the compact grid."""
    *first, last = encoder.config.sr_ratios
    return [*(_widened(encoder) * ratio for ratio in first), last]


def _tensors(method: Method, source: Source) -> dict[str, Tensor]:
    """The source's tensors under a method's names, its merges in the order of this method's."""
    encoder = source.encoder
    held: Mapping[str, Tensor] = encoder.state_dict()
    if merges_by_rows(encoder) != merges_by_rows(method.encoder):
        held = turn_merges(held)
    tensors = {**{f"encoder.{key}": tensor for key, tensor in held.items()}, **source.rest}
    if isinstance(encoder, ViT) and _passes_mlp(tensors) and not _passes_mlp(method.state_dict()):
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(CLASS_MLP)}
        tensors[CLASS_TOKEN] = encoder.class_token().detach()  # what its MLP makes of it
    tables = list(blocks_tables(encoder).values()) if isinstance(encoder, BlockwiseViT) else []
    if tables and all(table.equal(tables[0]) for table in tables):  # of a probe: nothing was trained
        tensors = {key: tensor for key, tensor in tensors.items() if ".rel_pos_bias." not in key}
        tensors[SHARED_TABLE] = tables[0].detach()
    return tensors


def _passes_mlp(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the class token passes an MLP before it joins the patches (TEC's)."""
    return any(key.startswith(CLASS_MLP) for key in tensors)


def _is_frozen(method: Method, key: str) -> bool:
    frozen = method.frozen()
    return frozen is not None and any(child is frozen and key.startswith(f"{name}.") for name, child in
                                      method.named_children())  # fmt: skip
