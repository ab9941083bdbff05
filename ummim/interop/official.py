"""Official checkpoints of the papers' code, in and out: an exact renaming (and reshaping) of tensors.

The official behaviour is kept, quirks included: importing sets a method's ``legacy_*`` options.
"""

import argparse
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ummim.checkpoint_file import key_faults, listed, read_checkpoint_file
from ummim.interop.errors import OfficialError
from ummim.interop.families import green_mim, local_mim, mae, mff, simmim, um_mae
from ummim.interop.family import Family
from ummim.interop.sizes import collect_sizes
from ummim.methods.api import Method
from ummim.nn.aggregation import PartialConfig, SpatialAggregation

FAMILIES: dict[str, Family] = {
    **mae.FAMILIES,
    **um_mae.FAMILIES,
    **simmim.FAMILIES,
    **green_mim.FAMILIES,
    **local_mim.FAMILIES,
    **mff.FAMILIES,
}


def load_official(family: str, checkpoint: str | os.PathLike[str] | Mapping[str, Any], **sizes: Any) -> Method:
    """The method of an official checkpoint, with its weights, in the checkpoint's own dtype, on the CPU.

    Args:
        family: a key of ``FAMILIES``.
        checkpoint: a file (``torch.save``, read with ``weights_only``, or safetensors) or a dict of tensors
            under the official names, bare or under ``model`` or ``state_dict``. With ``pr_dwconv.*`` keys the
            method gets PR-MIM's spatial aggregation; without ``vis_mask_token`` it has no secondary masking.
        **sizes: ``FAMILIES[family].sizes``, such as img_size, embed_dim(s), depth(s), num_heads, window_size,
            decoder_depth, norm_pix_loss, vis_mask_ratio (above 0: there is a vis_mask_token). What is not given is
            read off the tensors. Where they do not tell: ViT heads 64 wide (80 in ViT-H), 16 decoder heads, the
            official window, and norm_pix_loss as in the checkpoint's ``args``, else as in the reported models.

    Returns:
        A module: ``model(images, plan)`` gives ``.loss`` and ``.prediction``.

    Raises:
        OfficialError: an unknown family or size, sizes that do not fit each other, an unreadable file, or keys
            that are missing, left over or of another shape; the message names them.
        OSError: a file that cannot be opened.
    """
    kind = _lookup(family)
    tensors, args = read_checkpoint(checkpoint)
    with torch.device("meta"):  # shapes only: every tensor comes from the checkpoint
        model = kind.build(tensors, collect_sizes(family, kind.sizes, sizes, args, kind.norm_pix))
    own = model.state_dict()
    names = kind.names(model)
    constants = kind.constants(model)
    shapes = {official: kind.shape(official, own[ours].shape) for official, ours in names.items()}
    check_keys(family, tensors, {**shapes, **{key: tuple(value.shape) for key, value in constants.items()}})
    check_constants(family, tensors, constants)
    assign(model, tensors, names)
    return model


def save_official(model: nn.Module, family: str) -> dict[str, Tensor]:
    """The model's tensors under the official names and shapes, in the official order; like ``state_dict``, it shares
    memory with the model. PR-MIM's convolution, which has no official name, is ``pr_dwconv``.

    What no official tensor tells, such as heads, taps or a decoder's order, is not in it.

    Raises:
        OfficialError: an unknown family, a model of another one, or one with an option that the family cannot hold.
    """
    kind, own = _lookup(family), model.state_dict()
    saved = {
        official: own[ours].reshape(kind.shape(official, own[ours].shape)).contiguous()
        for official, ours in official_names(model, family).items()
    }
    constants = kind.constants(model)
    return {key: saved[key] if key in saved else constants[key] for key in _in_place(list(saved), constants)}


def _in_place(order: list[str], constants: Iterable[str]) -> list[str]:
    """The order of a state dict: a fixed tensor behind the other tensors of its module, but before those of the
    module's children. A filter stands before its bias.
    """
    for key in constants:
        module, leaf = key.rsplit(".", 1)
        inside = [i for i, name in enumerate(order) if name.startswith(f"{module}.")]
        behind = [i for i in inside if "." in order[i].removeprefix(f"{module}.") or leaf == "weight"]
        order.insert(behind[0] if behind else inside[-1] + 1 if inside else len(order), key)
    return order


def official_names(model: nn.Module, family: str) -> dict[str, str]:
    """Official name -> our name of every tensor of the model's state dict, in the official order.

    Raises:
        OfficialError: an unknown family, a model of another one, or one with an option that the family cannot hold.
    """
    kind = _lookup(family)
    if not isinstance(model, kind.method) or not kind.accepts(model):
        encoder = type(getattr(model, "encoder", model)).__name__
        raise OfficialError(f"{family} is another model than this {type(model).__name__} on {encoder}")
    if unsaid := kind.unsaid(model) or _unsaid_aggregation(model):
        raise OfficialError(f"{family} cannot hold this {type(model).__name__}: {unsaid}")
    return kind.names(model)


def _unsaid_aggregation(model: nn.Module) -> str:
    """An option of PR-MIM's aggregation that neither names nor shapes tell; empty: none. The kernel's side is told."""
    for module in model.modules():
        if isinstance(module, SpatialAggregation):
            usual = PartialConfig(kernel_size=module.config.kernel_size)
            for name, value in asdict(module.config).items():
                if value != getattr(usual, name):
                    return f"partial.{name} = {value}: only {getattr(usual, name)} can be told from a checkpoint"
    return ""


def assign(model: nn.Module, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Make copies of the tensors the model's own, laid out plainly; ``names`` is {official key: our key}."""
    own = model.state_dict()
    model.load_state_dict(
        {
            ours: tensors[key].detach().clone(memory_format=torch.contiguous_format).reshape(own[ours].shape)
            for key, ours in names.items()
        },
        assign=True,
    )


def family_of(model: nn.Module) -> str | None:
    """The family whose official format holds this model, if there is one."""
    fits = (name for name, kind in FAMILIES.items() if isinstance(model, kind.method) and kind.accepts(model))
    return next(fits, None)


def _lookup(family: str) -> Family:
    if family not in FAMILIES:
        raise OfficialError(f"family {family!r} is not supported; supported are: {', '.join(FAMILIES)}")
    return FAMILIES[family]


def read_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any],
) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """The tensors, and the run's arguments if the container holds them."""
    where = "the checkpoint" if isinstance(source, Mapping) else os.fspath(source)
    held = source if isinstance(source, Mapping) else _read_file(where)
    inner = next((held[key] for key in ("model", "state_dict") if isinstance(held.get(key), Mapping)), None)
    tensors = held if inner is None else inner
    if not tensors:
        raise OfficialError(f"{where} holds an empty state dict")
    if strangers := [str(key) for key, value in tensors.items() if not isinstance(value, Tensor)]:
        raise OfficialError(f"{where} holds no state dict, bare or under model or state_dict: {listed(strangers)}")
    args = None if inner is None else held.get("args")
    return tensors, vars(args) if isinstance(args, argparse.Namespace) else {}


def _read_file(path: str) -> Mapping[str, Any]:
    try:
        return read_checkpoint_file(path)
    except ValueError as error:
        raise OfficialError(f"{path} {error}") from error


def check_constants(family: str, tensors: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> None:
    """Raise OfficialError, naming them, for fixed tensors (indices, masks) that are not what we compute."""
    changed = [key for key, value in constants.items() if not torch.equal(tensors[key], value.to(tensors[key].dtype))]
    if changed:
        raise OfficialError(f"the checkpoint is no {family} of these sizes: fixed tensors differ: {listed(changed)}")


def check_keys(family: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise OfficialError, naming them, for keys that are missing, left over or of another shape."""
    if faults := key_faults(tensors, shapes):
        raise OfficialError(f"the checkpoint is no {family} of these sizes: {faults}")
