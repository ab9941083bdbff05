"""Sizes of an official checkpoint's model: given, else read off the tensors, else the official ones."""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import nextafter
from typing import Any

from torch import Tensor

from ummim.nn.aggregation import PartialConfig
from ummim.nn.decoder import DecoderConfig

Tensors = Mapping[str, Tensor]
Sizes = Mapping[str, Any]
Four = tuple[int, int, int, int]

VIT_SIZES = (
    "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio",
    "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "norm_pix_loss",
)  # fmt: skip
SPELLINGS = {"embed_dims": "embed_dim", "depths": "depth", "mlp_ratios": "mlp_ratio"}


def collect_sizes(family: str, known: Sequence[str], given: Sizes, args: Sizes, norm_pix: bool) -> dict[str, Any]:
    """The given sizes under one spelling each, and norm_pix_loss: given, of the checkpoint's args, or the default.

    Raises:
        ValueError: a size that the family does not have.
    """
    sizes = {SPELLINGS.get(name, name): value for name, value in given.items() if value is not None}
    if unknown := [name for name in given if SPELLINGS.get(name, name) not in known]:
        raise ValueError(f"{family} has no size {', '.join(unknown)}; its sizes are: {', '.join(known)}")
    return {"norm_pix_loss": args.get("norm_pix_loss", norm_pix), **sizes}


def decoder(tensors: Tensors, sizes: Sizes) -> DecoderConfig:
    """The sizes of a light decoder, from the MAE family's keys."""
    dim = one(sizes, "decoder_embed_dim", shape_of(tensors, "mask_token", 2, 512))
    return DecoderConfig(
        embed_dim=dim,
        depth=one(sizes, "decoder_depth", depth_of(tensors, "decoder_blocks")),
        num_heads=one(sizes, "decoder_num_heads", 16),
        mlp_ratio=one(sizes, "mlp_ratio", mlp_ratio(tensors, "decoder_blocks.0", dim)),
    )


def partial(tensors: Tensors) -> tuple[PartialConfig, bool]:
    """PR-MIM's aggregation is part of the model if its keys are there."""
    throwing = any(key.startswith("pr_dwconv.") for key in tensors)
    return PartialConfig(kernel_size=shape_of(tensors, "pr_dwconv.weight", 2, 7)), throwing


def shape_of(tensors: Tensors, key: str, dim: int, default: int) -> int:
    """A size read off a tensor; the default if it is not there, which the check of the keys reports."""
    return tensors[key].shape[dim] if key in tensors and tensors[key].ndim > dim else default


def depth_of(tensors: Tensors, prefix: str) -> int:
    """Number of blocks under a prefix."""
    found = [re.match(rf"{prefix}\.(\d+)\.", key) for key in tensors]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def mlp_ratio(tensors: Tensors, block: str, dim: int) -> float:
    """Hidden width of a block's MLP, in widths."""
    hidden = shape_of(tensors, f"{block}.mlp.fc1.weight", 0, 4 * dim)
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else nextafter(ratio, float("inf"))


def one(sizes: Sizes, name: str, default: Any) -> Any:
    """A size that is one number, given as such or as a sequence of equal ones."""
    value = sizes.get(name, default)
    values = list(value) if isinstance(value, Sequence) else [value]
    if len(set(values)) != 1:
        raise ValueError(f"{name} = {value!r} must be one number for this family")
    return values[0]


def four(sizes: Sizes, name: str, default: float | Sequence[float], growth: int = 2) -> Any:
    """A size per stage, given as four numbers or as the first; ``growth`` multiplies it at each merge."""
    value = sizes.get(name, default)
    four = tuple(value) if isinstance(value, Sequence) else tuple(value * growth**s for s in range(4))
    if len(four) != 4:
        raise ValueError(f"{name} = {value!r} must have one number for each of the four stages")
    return four


def fitting(problems: Iterable[tuple[str, str]]) -> None:
    """Raise ValueError for the first complaint of a config."""
    for key, problem in problems:
        raise ValueError(f"{key.rsplit('.', 1)[-1]}: {problem}")
