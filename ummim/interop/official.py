"""Official checkpoints of the papers' code, in and out: an exact renaming (and reshaping) of tensors.

Families: ``mae_vit`` (facebookresearch/mae) and ``um_mae_swin`` (implus/UM-MAE). The official behaviour is
kept, quirks included: see ``legacy_decoder_order`` of UM-MAE.
"""

import argparse
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ummim.interop.sizes import MAE_SIZES, SWIN_SIZES, build_mae, build_um_mae_swin, collect_sizes
from ummim.methods.mae import MAE
from ummim.methods.um_mae import UMMAE


class Family(NamedTuple):
    """One kind of official model."""

    method: type[nn.Module]
    build: Callable[[Mapping[str, Tensor], Mapping[str, Any]], nn.Module]  # from tensors and sizes
    sizes: tuple[str, ...]  # keywords of load_official


FAMILIES = {
    "mae_vit": Family(MAE, build_mae, MAE_SIZES),
    "um_mae_swin": Family(UMMAE, build_um_mae_swin, SWIN_SIZES),
}

# Prefixes of our names and of the official ones. The order of the rows is the official order of keys.
PREFIXES = (
    ("encoder.cls_token", "cls_token"),
    ("encoder.pos_embed", "pos_embed"),
    ("encoder.vis_mask_token", "vis_mask_token"),
    ("decoder.mask_token", "mask_token"),
    ("decoder.pos_embed", "decoder_pos_embed"),
    ("encoder.patch_embed.", "patch_embed."),
    ("encoder.blocks.", "blocks."),
    ("encoder.stages.", "blocks."),
    ("encoder.norm.", "norm."),
    ("embed.", "decoder_embed."),
    ("decoder.blocks.", "decoder_blocks."),
    ("head.norm.", "decoder_norm."),
    ("head.pred.", "decoder_pred."),
    ("aggregation.dwconv.", "pr_dwconv."),  # PR-MIM has no official code, so these names are our own
)


def load_official(family: str, checkpoint: str | os.PathLike[str] | Mapping[str, Any], **sizes: Any) -> nn.Module:
    """The method of an official checkpoint, with its weights, in the checkpoint's own dtype, on the CPU.

    Args:
        family: ``mae_vit`` or ``um_mae_swin``.
        checkpoint: a file (``torch.save``, read with ``weights_only``, or safetensors) or a dict of tensors
            under the official names, bare or under ``model`` or ``state_dict``. With ``pr_dwconv.*`` keys the
            method gets PR-MIM's spatial aggregation; without ``vis_mask_token`` it has no secondary masking.
        **sizes: img_size, patch_size, embed_dim(s), depth(s), num_heads, mlp_ratio(s), decoder_embed_dim,
            decoder_depth, decoder_num_heads, norm_pix_loss; for um_mae_swin also window_size, posmlp_dim and
            vis_mask_ratio (above 0: there is a vis_mask_token). What is not given is read off the tensors.
            Where they do not tell: ViT heads 64 wide (80 in ViT-H), 16 decoder heads, window 8, and
            norm_pix_loss as in the checkpoint's ``args``, else True as in the papers' reported models.

    Returns:
        A module: ``model(images, plan)`` gives ``.loss`` and ``.prediction``.

    Raises:
        ValueError: an unknown family or size, sizes that do not fit each other, an unreadable file, or keys
            that are missing, left over or of another shape; the message names them.
        OSError: a file that cannot be opened.
    """
    kind = _lookup(family)
    tensors, args = _read(checkpoint)
    with torch.device("meta"):  # shapes only: every tensor comes from the checkpoint
        model = kind.build(tensors, collect_sizes(family, kind.sizes, sizes, args))
    own = model.state_dict()
    names = official_names(model, family)
    shapes = {official: official_shape(official, own[ours].shape) for official, ours in names.items()}
    _check_keys(family, tensors, shapes)
    loaded = {ours: tensors[key].detach().clone().reshape(own[ours].shape) for key, ours in names.items()}
    model.load_state_dict(loaded, assign=True)
    return model


def save_official(model: nn.Module, family: str) -> dict[str, Tensor]:
    """The model's tensors under the official names, in the official order and shapes; like
    ``state_dict``, it shares memory with the model.

    Raises:
        ValueError: an unknown family, or a model of another one.
    """
    own = model.state_dict()
    return {
        official: own[ours].reshape(official_shape(official, own[ours].shape)).contiguous()
        for official, ours in official_names(model, family).items()
    }


def official_names(model: nn.Module, family: str) -> dict[str, str]:
    """Official name -> our name of every tensor of the model's state dict, in the official order.

    Raises:
        ValueError: an unknown family, or a model of another one.
    """
    method = _lookup(family).method
    if not isinstance(model, method):
        raise ValueError(f"{family} is a {method.__name__}, not a {type(model).__name__}")
    ranked = []
    for ours in model.state_dict():
        place = next(i for i, (prefix, _) in enumerate(PREFIXES) if ours.startswith(prefix))
        official, block = _flat_block(ours.replace(*PREFIXES[place], 1), model)
        ranked.append(((place, block, ".downsample." in official), official, ours))
    ranked.sort(key=lambda entry: entry[0])  # stable: within a block our order is the official one
    return {official: ours for _, official, ours in ranked}


def official_shape(official: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The official shape of our tensor: position MLPs are 1x1 convolutions there, linear layers here."""
    linear = ".attn.posmlp." in official and len(shape) == 2
    return (*shape, 1, 1) if linear else tuple(shape)


def _flat_block(name: str, model: nn.Module) -> tuple[str, int]:
    """Official blocks are one list through all stages, the merge before a stage belonging to its first block.

    Returns the name and, for blocks in stages, the block's index.
    """
    match = re.match(r"blocks\.(\d+)\.(?:blocks\.(\d+)\.|merge\.)", name)
    if match is None:
        return name, 0
    encoder: Any = model.encoder
    flat = sum(len(stage.blocks) for stage in encoder.stages[: int(match[1])]) + int(match[2] or 0)
    return f"blocks.{flat}.{'' if match[2] else 'downsample.'}{name[match.end() :]}", flat


def _lookup(family: str) -> Family:
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not supported; supported are: {', '.join(FAMILIES)}")
    return FAMILIES[family]


def _read(
    source: str | os.PathLike[str] | Mapping[str, Any],
) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """The tensors, and the run's arguments if the container holds them."""
    where = "the checkpoint" if isinstance(source, Mapping) else os.fspath(source)
    held = source if isinstance(source, Mapping) else _read_file(where)
    inner = next((held[key] for key in ("model", "state_dict") if isinstance(held.get(key), Mapping)), None)
    tensors = held if inner is None else inner
    if not tensors:
        raise ValueError(f"{where} holds an empty state dict")
    if strangers := [str(key) for key, value in tensors.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{where} holds no state dict, bare or under model or state_dict: {_listed(strangers)}")
    args = None if inner is None else held.get("args")
    return tensors, vars(args) if isinstance(args, argparse.Namespace) else {}


def _read_file(path: str) -> Mapping[str, Any]:
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the official code stores its arguments
            held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(held, Mapping):
        raise ValueError(f"{path} holds a {type(held).__name__}, not a state dict")
    return held


def _check_keys(family: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    problems = []
    if missing := [key for key in shapes if key not in tensors]:
        problems.append(f"missing keys: {_listed(missing)}")
    if left_over := [key for key in tensors if key not in shapes]:
        problems.append(f"left-over keys: {_listed(left_over)}")
    if misfits := [key for key in shapes if key in tensors and tensors[key].shape != shapes[key]]:
        each = [f"{key} {tuple(tensors[key].shape)} instead of {shapes[key]}" for key in misfits]
        problems.append(f"mis-shaped keys: {_listed(each)}")
    if problems:
        raise ValueError(f"the checkpoint is no {family} of these sizes: {'; '.join(problems)}")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"
