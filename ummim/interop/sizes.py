"""Sizes of an official checkpoint's model: given, else read off the tensors, else the official ones.

A size is read off several tensors and the majority counts, so that the one tensor that is missing or mis-shaped is
what the check of the keys finds, and not everything else.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isqrt, nextafter
from typing import Any

from torch import Tensor

from ummim.interop.errors import OfficialError
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
KEYWORDS = {  # of a recipe's keys, where the last part alone is not the keyword
    "data.image_size": "img_size",
    "method.decoder.embed_dim": "decoder_embed_dim",
    "method.decoder.embed_dims": "decoder_embed_dim",
    "method.decoder.num_heads": "decoder_num_heads",
    "method.hog_bins": "hog_nbins",
}


def collect_sizes(family: str, known: Sequence[str], given: Sizes, args: Sizes, norm_pix: bool) -> dict[str, Any]:
    """The given sizes under one spelling each, and norm_pix_loss: given, of the checkpoint's args, or the default.

    Raises:
        OfficialError: a size that the family does not have.
    """
    sizes = {SPELLINGS.get(name, name): value for name, value in given.items() if value is not None}
    if unknown := [name for name in given if SPELLINGS.get(name, name) not in known]:
        raise OfficialError(f"{family} has no size {', '.join(unknown)}; its sizes are: {', '.join(known)}")
    return {"norm_pix_loss": args.get("norm_pix_loss", norm_pix), **sizes}


def decoder(tensors: Tensors, sizes: Sizes) -> DecoderConfig:
    """The sizes of a light decoder, from the MAE family's keys."""
    read = [shape_of(tensors, *at) for at in (("mask_token", 2), ("decoder_pos_embed", 2), ("decoder_pred.weight", 1))]
    dim = one(sizes, "decoder_embed_dim", agreed(512, *read))
    return DecoderConfig(
        embed_dim=dim,
        depth=one(sizes, "decoder_depth", depth_of(tensors, "decoder_blocks")),
        num_heads=one(sizes, "decoder_num_heads", 16),
        mlp_ratio=mlp_ratio(tensors, "decoder_blocks.0", dim),
    )


def partial(tensors: Tensors) -> tuple[PartialConfig, bool]:
    """PR-MIM's aggregation, and whether it is part of the model: if its keys are there.

    Raises:
        OfficialError: a kernel without a centre.
    """
    throwing = any(re.search(r"(^|\.)pr_dwconv\.", key) for key in tensors)
    kernels = [key for key in tensors if key.endswith("pr_dwconv.weight")]
    side = agreed(7, *(shape_of(tensors, key, dim) for key in kernels for dim in (2, 3)))
    if side % 2 == 0:
        raise OfficialError(f"mis-shaped keys: {kernels[0]}: a kernel's side must be odd, not {side}")
    return PartialConfig(kernel_size=side), throwing


def shape_of(tensors: Tensors, key: str, dim: int) -> int | None:
    """A size read off one tensor; None if it is not there, which the check of the keys reports."""
    return tensors[key].shape[dim] if key in tensors and tensors[key].ndim > dim else None


def agreed(default: int, *read: int | None) -> int:
    """What most tensors say, the first of them where they are split; the default if none says anything."""
    votes = Counter(size for size in read if size is not None)
    return votes.most_common(1)[0][0] if votes else default


def root(area: int | None) -> int | None:
    """Side of a square; None if it is none."""
    return isqrt(area) if area is not None and area > 0 and isqrt(area) ** 2 == area else None


def table_side(tensors: Tensors, table: str, cls_token: bool = False) -> int | None:
    """Side of the grid that a position table (1, [1 +] N, D) is for."""
    tokens = shape_of(tensors, table, 1)
    return None if tokens is None else root(tokens - cls_token)


def kernel_side(tensors: Tensors, key: str) -> int | None:
    """Side of a convolution's square kernel."""
    height, width = shape_of(tensors, key, 2), shape_of(tensors, key, 3)
    return height if height == width else None


def pixel_side(tensors: Tensors, module: str) -> int | None:
    """Side of the patch whose RGB pixels a linear layer predicts."""
    out = agreed(0, shape_of(tensors, f"{module}.weight", 0), shape_of(tensors, f"{module}.bias", 0))
    return root(out // 3) if out % 3 == 0 else None


def heads_of(dim: int, read: Iterable[int | None]) -> int:
    """Attention heads, of those numbers that divide the width; 1 if none does, which the tensors then contradict."""
    return agreed(1, *(heads for heads in read if heads and dim > 0 and dim % heads == 0))


def depth_of(tensors: Tensors, prefix: str) -> int:
    """Number of blocks under a prefix, at least one: no published model is without, so they would be missing."""
    found = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in tensors]
    return 1 + max((int(match[1]) for match in found if match), default=0)


def mlp_ratio(tensors: Tensors, block: str, dim: int) -> float:
    """Hidden width of a block's MLP, in widths."""
    read = [
        shape_of(tensors, f"{block}.mlp.{at}", d) for at, d in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1))
    ]
    hidden = agreed(4 * dim, *read)
    ratio = hidden / max(dim, 1)
    return ratio if int(dim * ratio) == hidden else nextafter(ratio, float("inf"))


def one(sizes: Sizes, name: str, default: Any) -> Any:
    """A size that is one number, given as such or as a sequence of equal ones."""
    value = sizes.get(name, default)
    values = list(value) if isinstance(value, Sequence) else [value]
    if len(set(values)) != 1:
        raise OfficialError(f"{name} = {value!r} must be one number for this family")
    return values[0]


def four(sizes: Sizes, name: str, read: Callable[[], float | Sequence[float]], growth: int = 2) -> Any:
    """A size per stage, given as four numbers or as the first; ``growth`` multiplies it at each merge."""
    value = sizes[name] if name in sizes else read()
    four = tuple(value) if isinstance(value, Sequence) else tuple(value * growth**s for s in range(4))
    if len(four) != 4:
        raise OfficialError(f"{name} = {value!r} must have one number for each of the four stages")
    return four


def doubling(sizes: Sizes, read: int) -> int:
    """The first stage's width, where the width doubles at each merge."""
    dims = four(sizes, "embed_dim", lambda: read)
    if any(dims[s + 1] != 2 * dims[s] for s in range(3)):
        raise OfficialError(f"embed_dims = {dims} must double at every stage")
    return dims[0]


def window(sizes: Sizes, maps: Sequence[int], default: int) -> int:
    """The window, given as one number or as each stage's, where a smaller map is one window."""
    value = sizes.get("window_size", default)
    if not isinstance(value, Sequence):
        return value
    largest = max(value)
    if any(min(largest, side) != min(given, side) for given, side in zip(value, maps, strict=False)):
        raise OfficialError(f"window_size = {value!r} must be one number: stages differ only where the map is smaller")
    return largest


def check_patch(sizes: Sizes, token: int, unit: int) -> None:
    """Raise OfficialError for a patch_size that is neither a pyramid's token nor the unit of its masks, in pixels."""
    if one(sizes, "patch_size", token) not in (token, unit):
        raise OfficialError(f"patch_size is {token} (tokens) or {unit} (of the masks), not {sizes['patch_size']}")


def fitting(problems: Iterable[tuple[str, str]]) -> None:
    """Raise OfficialError for the first complaint of a config, under the keyword of ``load_official``."""
    for key, problem in problems:
        raise OfficialError(f"{KEYWORDS.get(key, key.rsplit('.', 1)[-1])}: {problem}")
