"""Encoders that other libraries saved, as ours: what Hugging Face's and timm's readers share."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ummim.backbones.relative_vit import RelativeViT, RelativeViTConfig
from ummim.backbones.table_swin import TableSwin, TableSwinConfig
from ummim.backbones.vit import ViT, ViTConfig
from ummim.checkpoint_file import key_faults
from ummim.downstream.adapt import Pretrained
from ummim.downstream.relative_vit import BlockwiseViT
from ummim.errors import UserError
from ummim.methods.api import check_heads, check_patches, check_swin, check_width
from ummim.nn.layers import set_eps

ForeignConfig = ViTConfig | RelativeViTConfig | TableSwinConfig


class Foreign(NamedTuple):
    """What a file or folder of another library holds.

    Attributes:
        what: it, in a word or two.
        encoder: ours, with its weights in float32 on the CPU; without a final norm where the file has none.
        rest: other tensors, under the names of the method that they are of: a decoder, a head.
        left: names, there, of the tensors that have no place.
    """

    what: str
    encoder: Pretrained
    rest: dict[str, Tensor]
    left: list[str]


def foreign_encoder(
    config: ForeignConfig, image_size: int, has: Callable[[str], bool], eps: float, where: str
) -> Pretrained:
    """An encoder of these sizes without values (on the device ``meta``), of the parts that a file has.

    Args:
        config: the sizes.
        image_size: side of the images, in pixels.
        has: whether the file has the tensor of this name (ours).
        eps: of all norms.
        where: the file, for messages.

    Raises:
        UserError: sizes that do not fit each other.
    """
    check_sizes(config, image_size, where)
    encoder: ViT | RelativeViT | TableSwin
    with torch.device("meta"):
        if isinstance(config, ViTConfig):
            encoder = ViT(image_size, config)
        elif isinstance(config, TableSwinConfig):
            encoder = TableSwin(image_size, config)
        elif has("blocks.0.rel_pos_bias.relative_position_bias_table"):
            encoder = BlockwiseViT(image_size, config)
        else:
            encoder = RelativeViT(image_size, config)
    if isinstance(encoder, RelativeViT | TableSwin) and not has("mask_token"):
        encoder.mask_token = None  # type: ignore[assignment]
    if not has("norm.weight"):
        encoder.norm = nn.Identity()
    set_eps(encoder, eps)
    return encoder


def check_sizes(config: ForeignConfig, image_size: int, where: str) -> None:
    """Raise UserError for sizes that do not fit each other."""
    problems: Iterable[tuple[str, str]]
    if isinstance(config, TableSwinConfig):
        problems = check_swin(config, image_size)
    else:
        check = check_width if isinstance(config, ViTConfig) else check_heads
        problems = [*check_patches(image_size, config.patch_size),
                    *check("method.encoder", config.embed_dim, config.num_heads)]  # fmt: skip
    for key, problem in problems:
        raise UserError(f"{where}: {key.rpartition('.')[2]}, for images of {image_size} pixels: {problem}")


def fill_in(encoder: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Give an encoder its values, in float32.

    Raises:
        UserError: keys that are missing, left over or of another shape; the message names them.
    """
    if faults := key_faults(tensors, {key: tuple(value.shape) for key, value in encoder.state_dict().items()}):
        raise UserError(f"{where}: the tensors do not fit its sizes: {faults}")
    encoder.load_state_dict({key: tensor.float().contiguous() for key, tensor in tensors.items()}, assign=True)
