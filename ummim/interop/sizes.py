"""Sizes of an official checkpoint's model: given, else read off the tensors, else the official ones."""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import isqrt, nextafter
from typing import Any

from torch import Tensor

from ummim.backbones.swin import MASK_PATCH, TOKEN, SwinConfig
from ummim.backbones.vit import ViTConfig
from ummim.methods import mae, um_mae
from ummim.nn.aggregation import PartialConfig
from ummim.nn.decoder import DecoderConfig

Tensors = Mapping[str, Tensor]
Sizes = Mapping[str, Any]
Four = tuple[int, int, int, int]

MAE_SIZES = (
    "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio",
    "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "norm_pix_loss",
)  # fmt: skip
SWIN_SIZES = (*MAE_SIZES, "window_size", "posmlp_dim", "vis_mask_ratio")
SPELLINGS = {"embed_dims": "embed_dim", "depths": "depth", "mlp_ratios": "mlp_ratio"}
VIT_H_WIDTH, VIT_H_HEADS = 1280, 16


def collect_sizes(family: str, known: Sequence[str], given: Sizes, args: Sizes) -> dict[str, Any]:
    """The given sizes under one spelling each, and norm_pix_loss: given, of the checkpoint's args, or True.

    Raises:
        ValueError: a size that the family does not have.
    """
    sizes = {SPELLINGS.get(name, name): value for name, value in given.items() if value is not None}
    if unknown := [name for name in given if SPELLINGS.get(name, name) not in known]:
        raise ValueError(f"{family} has no size {', '.join(unknown)}; its sizes are: {', '.join(known)}")
    return {"norm_pix_loss": args.get("norm_pix_loss", True), **sizes}


def build_mae(tensors: Tensors, sizes: Sizes) -> mae.MAE:
    """MAE of these sizes. Raises ValueError where they do not fit each other."""
    dim = _one(sizes, "embed_dim", _shape(tensors, "cls_token", 2, 768))
    patch = _one(sizes, "patch_size", _shape(tensors, "patch_embed.proj.weight", 2, 16))
    config = mae.Config(
        encoder=ViTConfig(
            patch_size=patch,
            embed_dim=dim,
            depth=_one(sizes, "depth", _depth(tensors, "blocks")),
            num_heads=_one(sizes, "num_heads", VIT_H_HEADS if dim == VIT_H_WIDTH else max(1, dim // 64)),
            mlp_ratio=_one(sizes, "mlp_ratio", _mlp_ratio(tensors, "blocks.0", dim)),
        ),
        decoder=_decoder(tensors, sizes),
        norm_pix_loss=bool(sizes["norm_pix_loss"]),
    )
    side = isqrt(_shape(tensors, "pos_embed", 1, 197) - 1)
    image_size = _one(sizes, "img_size", side * patch)
    _fitting(config.check_sizes(image_size))
    return mae.MAE(image_size, config, *_partial(tensors))


def build_um_mae_swin(tensors: Tensors, sizes: Sizes) -> um_mae.UMMAE:
    """UM-MAE on Swin of these sizes. Raises ValueError where they do not fit each other."""
    if _one(sizes, "patch_size", TOKEN) not in (TOKEN, MASK_PATCH):
        raise ValueError(f"patch_size is {TOKEN} (tokens) or {MASK_PATCH} (mask patches), not {sizes['patch_size']}")
    dims = _four(sizes, "embed_dim", _shape(tensors, "patch_embed.proj.weight", 0, 96))
    if any(dims[s + 1] != 2 * dims[s] for s in range(3)):
        raise ValueError(f"embed_dims = {dims} must double at every stage")
    depths = _four(sizes, "depth", _stage_depths(tensors), growth=1)
    heads = [
        _shape(tensors, f"blocks.{sum(depths[:s])}.attn.posmlp.2.weight", 0, 3 * 2**s) for s in range(4)
    ]  # of each stage's first block
    side = isqrt(_shape(tensors, "decoder_pos_embed", 1, 256))
    image_size = _one(sizes, "img_size", side * MASK_PATCH)
    config = um_mae.Config(
        encoder=SwinConfig(
            embed_dim=dims[0],
            depths=depths,
            num_heads=_four(sizes, "num_heads", heads),
            window_size=_window(sizes, image_size),
            mlp_ratio=_one(sizes, "mlp_ratio", _mlp_ratio(tensors, "blocks.0", dims[0])),
            pos_mlp_dim=_one(sizes, "posmlp_dim", _shape(tensors, "blocks.0.attn.posmlp.0.weight", 0, 32)),
        ),
        decoder=_decoder(tensors, sizes),
        norm_pix_loss=bool(sizes["norm_pix_loss"]),
        legacy_decoder_order=True,
    )
    _fitting(config.check_sizes(image_size))
    secondary = _one(sizes, "vis_mask_ratio", float("vis_mask_token" in tensors)) > 0
    return um_mae.UMMAE(image_size, config, *_partial(tensors), secondary=secondary)


def _decoder(tensors: Tensors, sizes: Sizes) -> DecoderConfig:
    dim = _one(sizes, "decoder_embed_dim", _shape(tensors, "mask_token", 2, 512))
    return DecoderConfig(
        embed_dim=dim,
        depth=_one(sizes, "decoder_depth", _depth(tensors, "decoder_blocks")),
        num_heads=_one(sizes, "decoder_num_heads", 16),
        mlp_ratio=_one(sizes, "mlp_ratio", _mlp_ratio(tensors, "decoder_blocks.0", dim)),
    )


def _partial(tensors: Tensors) -> tuple[PartialConfig, bool]:
    """PR-MIM's aggregation is part of the model if its keys are there."""
    throwing = any(key.startswith("pr_dwconv.") for key in tensors)
    return PartialConfig(kernel_size=_shape(tensors, "pr_dwconv.weight", 2, 7)), throwing


def _shape(tensors: Tensors, key: str, dim: int, default: int) -> int:
    """A size read off a tensor; the default if it is not there, which the check of the keys reports."""
    return tensors[key].shape[dim] if key in tensors and tensors[key].ndim > dim else default


def _depth(tensors: Tensors, prefix: str) -> int:
    """Number of blocks under a prefix."""
    found = [re.match(rf"{prefix}\.(\d+)\.", key) for key in tensors]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _stage_depths(tensors: Tensors) -> Four:
    """Blocks per stage: the first block of a later stage owns a downsample."""
    found = {int(match[1]) for key in tensors if (match := re.match(r"blocks\.(\d+)\.downsample\.", key))}
    starts = [0, *sorted(found), _depth(tensors, "blocks")]
    if len(starts) != 5:
        raise ValueError(f"missing keys: downsample of three blocks marks the stages, found it at {sorted(found)}")
    return tuple(end - start for start, end in zip(starts, starts[1:], strict=False))  # type: ignore[return-value]


def _mlp_ratio(tensors: Tensors, block: str, dim: int) -> float:
    hidden = _shape(tensors, f"{block}.mlp.fc1.weight", 0, 4 * dim)
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else nextafter(ratio, float("inf"))


def _one(sizes: Sizes, name: str, default: Any) -> Any:
    """A size that is one number, given as such or as a sequence of equal ones."""
    value = sizes.get(name, default)
    values = list(value) if isinstance(value, Sequence) else [value]
    if len(set(values)) != 1:
        raise ValueError(f"{name} = {value!r} must be one number for this family")
    return values[0]


def _four(sizes: Sizes, name: str, default: int | Sequence[int], growth: int = 2) -> Four:
    """A size per stage, given as four numbers or as the first; ``growth`` multiplies it at each merge."""
    value = sizes.get(name, default)
    four = tuple(value) if isinstance(value, Sequence) else tuple(value * growth**s for s in range(4))
    if len(four) != 4:
        raise ValueError(f"{name} = {value!r} must have one number for each of the four stages")
    return four


def _window(sizes: Sizes, image_size: int) -> int:
    """The window, given as one number or as each stage's, where a smaller map is one window."""
    value = sizes.get("window_size", 8)
    if not isinstance(value, Sequence):
        return value
    window = max(value)
    maps = [image_size // (2 * TOKEN * 2**s) for s in range(4)]  # sides of the compact maps
    if any(min(window, side) != min(given, side) for given, side in zip(value, maps, strict=False)):
        raise ValueError(f"window_size = {value!r} must be one number: stages differ only where the map is smaller")
    return window


def _fitting(problems: Iterable[tuple[str, str]]) -> None:
    for key, problem in problems:
        raise ValueError(f"{key.rsplit('.', 1)[-1]}: {problem}")
