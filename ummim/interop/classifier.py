"""Official fine-tuned checkpoints in: classifiers on the encoders of all families."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from ummim.downstream.classify import Classifier
from ummim.interop.errors import OfficialError
from ummim.interop.families import um_mae
from ummim.interop.families.fine_tuned import CLASSIFIERS
from ummim.interop.official import assign, check_constants, check_keys, read_checkpoint
from ummim.interop.sizes import Tensors, collect_sizes

__all__ = ["CLASSIFIERS", "fine_tuned_classes", "load_official_classifier"]


def fine_tuned_classes(family: str, tensors: Tensors) -> int | None:
    """Number of classes of a fine-tuned checkpoint; None: it has no head, so it is a pre-training's.

    family: a key of ``CLASSIFIERS``.
    """
    head = tensors.get(CLASSIFIERS[family].classes)
    return None if head is None else len(head)


def load_official_classifier(
    family: str, checkpoint: str | os.PathLike[str] | Mapping[str, Any], num_classes: int, **sizes: Any
) -> Classifier:
    """The classifier of an official fine-tuned checkpoint, on the CPU: the mean of the patch tokens, a norm, the head.

    In SimMIM's and GreenMIM's Swin, the norm stands before the mean.

    Args:
        family: a key of ``CLASSIFIERS``.
        checkpoint: a file or a dict of tensors, as for ``load_official``; the pre-training's decoder, final norm
            and mask tokens are not part of it.
        num_classes: number of classes.
        **sizes: ``CLASSIFIERS[family].sizes``. What is not given is read off the tensors. Where they do not tell: heads
            64 wide (ViT-H: 80), and as in the official fine-tuning, 256 pixels and windows of 16 for UM-MAE's Swin and
            pooling ratios 8, 4, 2, 1 for its PVT.

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
    collected = collect_sizes(family, kind.sizes, sizes, {}, norm_pix=True)
    with torch.device("meta"):  # shapes only: every tensor comes from the checkpoint
        model = kind.build(tensors, num_classes, collected)
    own, names, constants = model.state_dict(), kind.names(model), kind.constants(model)
    shapes = {official: _shape(official, own[ours]) for official, ours in names.items()}
    shapes |= {key: tuple(value.shape) for key, value in constants.items()}
    check_keys(f"fine-tuned {family}", tensors, shapes)
    check_constants(f"fine-tuned {family}", tensors, constants)
    assign(model, tensors, names)
    return model


def _shape(official: str, own: torch.Tensor) -> tuple[int, ...]:
    return (*own.shape, 1, 1) if own.ndim == 2 and um_mae.pointwise(official) else tuple(own.shape)
