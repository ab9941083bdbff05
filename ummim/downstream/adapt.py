"""A pre-trained encoder as one for whole images, of the pre-training's size or another.

Every tensor of the pre-training is used, or named as left behind; so are those that start anew, and those resized.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ummim.backbones.pvt import PVT, PVTConfig
from ummim.backbones.pyramid import MASK_PATCH
from ummim.backbones.relative_vit import RelativeViT, RelativeViTConfig
from ummim.backbones.sparse_swin import PatchMerging, SparseSwin
from ummim.backbones.swin import Swin, SwinConfig
from ummim.backbones.table_swin import TableSwin, TableSwinConfig
from ummim.backbones.vit import ViT, ViTConfig
from ummim.downstream.relative_vit import BlockwiseViT, blocks_tables
from ummim.downstream.resize import resize_bias, resize_positions
from ummim.errors import UserError
from ummim.methods.api import check_heads, check_patches, check_swin
from ummim.methods.um_mae import check_pyramid
from ummim.nn.layers import eps_of, set_eps

Encoder = ViT | RelativeViT | Swin | PVT | TableSwin
Pretrained = Encoder | SparseSwin
EncoderConfig = ViTConfig | RelativeViTConfig | SwinConfig | PVTConfig | TableSwinConfig

_TABLE = "relative_position_bias_table"
_CLASS_TOKEN_ROWS = 3  # of a relative ViT's table: class token to patch, patch to class token, to itself


class Adapted(NamedTuple):
    """An encoder for whole images, and what became of the pre-training's tensors."""

    encoder: Encoder
    left: tuple[str, ...]  # of the pre-training, without a place here
    fresh: tuple[str, ...]  # of the encoder, not from the pre-training
    resized: tuple[str, ...]  # learned at another size


def image_size_of(encoder: nn.Module) -> int:
    """Side, in pixels, of the images that an encoder takes."""
    if isinstance(encoder, TableSwin | SparseSwin):
        return encoder.image_size
    if isinstance(encoder, ViT | RelativeViT):
        return encoder.grid[0] * encoder.config.patch_size
    assert isinstance(encoder, Swin | PVT)
    return encoder.grid[0] * MASK_PATCH


def new_encoder(config: EncoderConfig, image_size: int) -> Encoder:
    """A freshly initialised encoder for whole images, with a final norm.

    Raises:
        UserError: sizes that do not fit each other.
    """
    problems: Iterable[tuple[str, str]] = ()
    if isinstance(config, SwinConfig | PVTConfig):
        problems = check_pyramid(config, image_size, compact=False)
    elif isinstance(config, TableSwinConfig):
        problems = check_swin(config, image_size)
    else:
        problems = [*check_patches(image_size, config.patch_size),
                    *check_heads("method.encoder", config.embed_dim, config.num_heads)]  # fmt: skip
    for key, problem in problems:
        raise UserError(f"{key.removeprefix('method.')}, for images of {image_size} pixels: {problem}")
    if isinstance(config, ViTConfig):
        return ViT(image_size, config)
    if isinstance(config, RelativeViTConfig):
        return BlockwiseViT(image_size, config)
    encoder: Swin | PVT | TableSwin
    if isinstance(config, TableSwinConfig):
        encoder = TableSwin(image_size, config)
    elif isinstance(config, PVTConfig):
        encoder = PVT(image_size, config, hiding="replace")
    else:
        encoder = Swin(image_size, config, hiding="replace")
    encoder.mask_token = None  # nothing is hidden
    return encoder


def for_whole_images(pretrained: Pretrained, image_size: int | None = None) -> Adapted:
    """A copy of an encoder as a classifier needs it: without mask tokens, on the whole grid, of a given image size.

    Blocks, embedding and final norm are copied. Besides:

    * One that was pre-trained on the compact grid sees maps twice as wide: a Swin's windows get twice the side, a PVT
      pools keys and values over twice the side in all stages but the last (UM-MAE's fine-tuning).
    * A relative ViT's shared table becomes every block's own (SimMIM's fine-tuning).
    * A Swin of visible units (GreenMIM, LocalMIM) becomes Microsoft's, which merges 2x2 tokens column by column.
    * At another size, windows grow with the image, and tables are resized.

    Args:
        pretrained: a method's encoder, or one that was adapted before, which comes out as it is.
        image_size: side of the images, in pixels; the pre-training's unless given.

    Raises:
        UserError: an image size that does not fit the encoder.
    """
    size = image_size_of(pretrained) if image_size is None else image_size
    encoder = new_encoder(_whole_config(pretrained, size), size)
    if isinstance(pretrained.norm, nn.Identity) and not isinstance(encoder, TableSwin):
        encoder.norm = nn.Identity()
    if not isinstance(encoder, Swin | PVT):  # whose norms are of two kinds
        set_eps(encoder, eps_of(pretrained))
    given = dict(pretrained.state_dict())
    own = encoder.state_dict()
    placed = _placed(pretrained, given)
    resized = _resized(placed, encoder, own)
    first = next(pretrained.parameters())
    copies = {
        key: (resized.get(key, placed[key]) if key in placed else fresh.to(first)).detach().clone()
        for key, fresh in own.items()
    }
    encoder.load_state_dict(copies, assign=True)  # keeps each tensor's dtype and device
    used = {key for key in given if key in placed and key in own} | _folded(pretrained)
    return Adapted(
        encoder.train(pretrained.training),
        left=tuple(key for key in given if key not in used),
        fresh=tuple(key for key in own if key not in placed),
        resized=tuple(resized),
    )


def _whole_config(pretrained: Pretrained, size: int) -> EncoderConfig:
    """The sizes of the encoder for whole images of ``size`` pixels."""
    config, before = pretrained.config, image_size_of(pretrained)
    widen = 2 if isinstance(pretrained, Swin | PVT) and pretrained.hiding == "compact" else 1
    if isinstance(config, PVTConfig):
        first, second, third, last = config.sr_ratios
        return replace(config, sr_ratios=(widen * first, widen * second, widen * third, last))
    if isinstance(config, RelativeViTConfig):
        return replace(config, drop_path=0.0)
    if isinstance(config, ViTConfig):
        return config
    window, rest = divmod(widen * config.window_size * size, before)
    if rest:
        raise UserError(
            f"images of {size} pixels: windows of {widen * config.window_size} tokens at {before} pixels do not "
            "grow with them to a whole number of tokens; choose another size"
        )
    if isinstance(config, TableSwinConfig):
        return replace(config, window_size=window, drop_path=0.0)
    return replace(config, window_size=window)


def _placed(pretrained: Pretrained, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pre-training's tensors under the names of the encoder for whole images, at their own sizes."""
    placed = dict(given)
    if isinstance(pretrained, ViT):
        placed["cls_token"] = pretrained.class_token()
    if isinstance(pretrained, RelativeViT):
        placed |= blocks_tables(pretrained)
    if isinstance(pretrained, SparseSwin):
        for name, module in pretrained.named_modules():
            if isinstance(module, PatchMerging) and module.row_major:
                for leaf in ("norm.weight", "norm.bias", "reduction.weight"):
                    first, second, third, fourth = given[f"{name}.{leaf}"].chunk(4, dim=-1)
                    placed[f"{name}.{leaf}"] = torch.cat([first, third, second, fourth], dim=-1)
    return placed


def _resized(placed: dict[str, Tensor], encoder: Encoder, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tables whose size is another in ``encoder``, at its size."""
    resized = {}
    for key, before in placed.items():
        if key not in own or before.shape == own[key].shape:
            continue
        if key == "pos_embed" and not isinstance(encoder, Swin | TableSwin):
            side = encoder.grid[0] * (MASK_PATCH // 4 if isinstance(encoder, PVT) else 1)
            resized[key] = resize_positions(before, (side, side), class_token=not isinstance(encoder, PVT))
        elif key.endswith(_TABLE):
            others = _CLASS_TOKEN_ROWS if isinstance(encoder, RelativeViT) else 0
            side = round((len(own[key]) - others) ** 0.5)
            resized[key] = resize_bias(before, (side + 1) // 2, others)
    return resized


def _folded(pretrained: Pretrained) -> set[str]:
    """Tensors that are used without keeping their names: a class token's MLP (TEC), and a shared table (SimMIM)."""
    names = {key for key in pretrained.state_dict() if key.startswith("cls_token_mlp.")}
    return names | ({f"rel_pos_bias.{_TABLE}"} if getattr(pretrained, "rel_pos_bias", None) is not None else set())
