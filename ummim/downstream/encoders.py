"""Pre-trained encoders, from whatever holds one, as encoders for whole images; and classifiers on them."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ummim.downstream.adapt import Encoder, for_whole_images, new_encoder
from ummim.downstream.classify import Classifier, build_classifier
from ummim.errors import UserError
from ummim.interop.source import read_source

__all__ = ["Classifier", "build_classifier", "describe", "load_encoder", "new_encoder"]


def load_encoder(
    weights: str | os.PathLike[str], family: str | None = None, image_size: int | None = None, **sizes: Any
) -> tuple[Encoder, dict[str, Any]]:
    """A pre-trained encoder for whole images, with its final norm if it has one, in eval mode on the CPU.

    Args:
        weights: a run's folder or one of its checkpoints, of a pre-training or an evaluation; what ``ummim export``
            wrote; a folder of transformers (ViTMAE, ViT, BEiT, Swin); a file of timm's (ViT, BEiT, Swin); or an
            official checkpoint, of a pre-training (with its decoder or without) or fine-tuned.
        family: of an official checkpoint, a key of ``FAMILIES``; else None.
        image_size: side of the images, in pixels; that of the checkpoint unless given. Tables and windows follow.
        **sizes: of an official checkpoint, where the tensors do not tell: see ``load_official``.

    Returns:
        the encoder, and where it comes from: ``source`` (path), ``format`` (run, export, official, huggingface or
        timm), ``recipe`` (name, family or class), ``step`` (None if unknown), ``sha256`` (of the file, or of the
        checkpoint's list of files), and the names of tensors in ``left``, ``fresh`` and ``resized`` (see ``Adapted``).

    Raises:
        UserError: nothing there, a file that is not read as such, or sizes that do not fit.
    """
    path = Path(weights)
    if family is None and sizes:
        raise UserError(f"{path}: {', '.join(sizes)}: sizes go with the family of an official file only")
    source = read_source(path, family, sizes)
    try:
        adapted = for_whole_images(source.encoder, image_size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    told = {"format": source.form, "recipe": source.recipe, "step": source.step, "sha256": file_sha256(source.identity)}
    left = [*source.left, *source.rest, *adapted.left]
    names = {"left": left, "fresh": [*adapted.fresh], "resized": [*adapted.resized]}
    return adapted.encoder.eval(), {"source": str(path), **told, **names}


def describe(provenance: Mapping[str, Any], most: int = 4) -> str:
    """What :func:`load_encoder` told, in a line."""
    step = "" if provenance["step"] is None else f", step {provenance['step']}"
    text = f"encoder of {provenance['recipe']}{step}, from {provenance['source']} ({provenance['sha256'][:12]})"
    for key, words in (("left", "not used"), ("fresh", "starting anew"), ("resized", "resized")):
        names = provenance[key]
        more = f" and {len(names) - most} more" if len(names) > most else ""
        text += f"; {words}: {', '.join(names[:most])}{more}" if names else ""
    return text


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
