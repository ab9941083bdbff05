"""Official fine-tuned checkpoints in: classifiers on MAE's and UM-MAE's encoders."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ummim.backbones.pyramid import TOKEN
from ummim.downstream.adapt import Encoder, new_encoder
from ummim.downstream.classify import Classifier
from ummim.interop.errors import OfficialError
from ummim.interop.families import mae, um_mae
from ummim.interop.family import rename
from ummim.interop.official import assign, check_keys, read_checkpoint
from ummim.interop.sizes import Sizes, Tensors, collect_sizes, fitting, one, table_side
from ummim.methods.um_mae import Config, check_pyramid

FINE_TUNED_SIZE = 256  # pixels, of UM-MAE's pyramids
HEAD = (("fc_norm.", "fc_norm."), ("head.", "head."))


class ClassifierFamily(NamedTuple):
    """One kind of official fine-tuned model.

    Attributes:
        encoder: our encoder for whole images, from the checkpoint's tensors and the sizes given.
        sizes: keywords of ``load_official_classifier``.
        names: model -> {official key: our key of its state dict}.
    """

    encoder: Callable[[Tensors, Sizes], Encoder]
    sizes: tuple[str, ...]
    names: Callable[[Any], dict[str, str]]


def load_official_classifier(
    family: str, checkpoint: str | os.PathLike[str] | Mapping[str, Any], num_classes: int, **sizes: Any
) -> Classifier:
    """The classifier of an official fine-tuned checkpoint (mean of patch tokens, fc_norm, head), on the CPU.

    Args:
        family: a key of ``CLASSIFIERS``.
        checkpoint: a file or a dict of tensors, as for ``load_official``; the pre-training's decoder, final norm
            and mask tokens are not part of it.
        num_classes: number of classes.
        **sizes: ``CLASSIFIERS[family].sizes``. What is not given is read off the tensors. Where they do not tell: heads
            64 wide (ViT-H: 80), and as in the official fine-tuning, 256 pixels and windows of 16 for Swin and pooling
            ratios 8, 4, 2, 1 for PVT.

    Returns:
        A module: ``model(images)`` gives logits (B, num_classes). A ViT's and a PVT's position table is a parameter.

    Raises:
        OfficialError: an unknown family or size, sizes that do not fit each other, an unreadable file, or keys
            that are missing, left over or of another shape; the message names them.
        OSError: a file that cannot be opened.
    """
    if family not in CLASSIFIERS:
        raise OfficialError(f"family {family!r} has no classifier; those that have one are: {', '.join(CLASSIFIERS)}")
    kind = CLASSIFIERS[family]
    tensors, _ = read_checkpoint(checkpoint)
    with torch.device("meta"):  # shapes only: every tensor comes from the checkpoint
        encoder = kind.encoder(tensors, collect_sizes(family, kind.sizes, sizes, {}, norm_pix=True))
        model = Classifier(encoder, num_classes)
    own, names = model.state_dict(), kind.names(model)
    shapes = {official: _shape(official, own[ours]) for official, ours in names.items()}
    check_keys(f"fine-tuned {family}", tensors, shapes)
    assign(model, tensors, names)
    return model


def _shape(official: str, own: torch.Tensor) -> tuple[int, ...]:
    return (*own.shape, 1, 1) if own.ndim == 2 and um_mae.pointwise(official) else tuple(own.shape)


def _vit(tensors: Tensors, sizes: Sizes) -> Encoder:
    config = mae.vit_config(tensors, sizes)
    image_size = mae.vit_image_size(tensors, sizes, config.patch_size)
    fitting(Config(config).check_sizes(image_size))
    return new_encoder(config, image_size)


def _swin(tensors: Tensors, sizes: Sizes) -> Encoder:
    image_size = one(sizes, "img_size", FINE_TUNED_SIZE)
    maps = [image_size // (TOKEN * 2**s) for s in range(4)]
    config = um_mae.swin_config(tensors, sizes, maps, default_window=16)
    fitting(check_pyramid(config, image_size, compact=False))
    return new_encoder(config, image_size)


def _pvt(tensors: Tensors, sizes: Sizes) -> Encoder:
    image_size = one(sizes, "img_size", (table_side(tensors, "pos_embed") or FINE_TUNED_SIZE // TOKEN) * TOKEN)
    config = um_mae.pvt_config(tensors, sizes, default_ratios=(8, 4, 2, 1))
    fitting(check_pyramid(config, image_size, compact=False))
    return new_encoder(config, image_size)


ENCODER_SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
CLASSIFIERS = {
    "mae_vit": ClassifierFamily(_vit, ENCODER_SIZES, lambda model: rename(model, (*mae.PREFIXES, *HEAD))),
    "um_mae_vit": ClassifierFamily(_vit, ENCODER_SIZES, lambda model: rename(model, (*mae.PREFIXES, *HEAD))),
    "um_mae_swin": ClassifierFamily(
        _swin,
        (*ENCODER_SIZES, "window_size", "posmlp_dim"),
        lambda model: um_mae.stage_names(model, (*um_mae.STAGES, *HEAD)),
    ),
    "um_mae_pvt": ClassifierFamily(
        _pvt, (*ENCODER_SIZES, "sr_ratios"), lambda model: um_mae.stage_names(model, (*um_mae.STAGES, *HEAD))
    ),
}
