"""Pre-trained encoders, from whatever holds one, as encoders for whole images; and classifiers on them."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ummim.checkpoint_file import key_faults
from ummim.downstream.adapt import Encoder, Pretrained, for_whole_images, new_encoder
from ummim.downstream.classify import Classifier, build_classifier
from ummim.downstream.trained import is_evaluation, load_trained
from ummim.engine.checkpoint import MANIFEST, STATE
from ummim.errors import CheckpointError, UserError
from ummim.interop.classifier import CLASSIFIERS, load_official_classifier
from ummim.interop.official import FAMILIES, assign, check_keys, read_checkpoint
from ummim.interop.run import load_run
from ummim.interop.sizes import Tensors, collect_sizes
from ummim.recipe import Recipe
from ummim.recipe_file import build_recipe
from ummim.run_config import RunConfig

__all__ = ["Classifier", "build_classifier", "describe", "load_encoder", "new_encoder"]

RECIPE = "ummim_recipe"  # of an exported file's metadata


def load_encoder(
    weights: str | os.PathLike[str], family: str | None = None, image_size: int | None = None, **sizes: Any
) -> tuple[Encoder, dict[str, Any]]:
    """A pre-trained encoder for whole images, with its final norm if it has one, in eval mode on the CPU.

    Args:
        weights: a run's folder or one of its checkpoints, of a pre-training or a fine-tuning; what ``ummim export``
            wrote as safetensors; or an official checkpoint, of a pre-training (with its decoder or without) or
            fine-tuned.
        family: of an official checkpoint, a key of ``FAMILIES``; else None.
        image_size: side of the images, in pixels; that of the checkpoint unless given. Tables and windows follow.
        **sizes: of an official checkpoint, where the tensors do not tell: see ``load_official``.

    Returns:
        the encoder, and where it comes from: ``source`` (path), ``format`` (run, export or official), ``recipe`` (name
        or family), ``step`` (None if unknown), ``sha256`` (of the file, or of the checkpoint's list of files), and the
        names of tensors in ``left``, ``fresh`` and ``resized`` (see ``Adapted``).

    Raises:
        UserError: nothing there, a file that is not read as such, or sizes that do not fit.
    """
    path = Path(weights)
    if family is None and sizes:
        raise UserError(f"{path}: {', '.join(sizes)}: sizes go with the family of an official file only")
    if path.is_dir():
        if family is not None:
            raise UserError(f"{path}: family = {family!r} is for official files; a run's recipe says what it is")
        found, told, left = _from_run(path)
    elif not path.is_file():
        raise UserError(f"{path}: no such file or folder; name a run, an exported safetensors or an official file")
    elif family is not None:
        found, told, left = _official(path, family, sizes)
    else:
        found, told, left = _exported(path)
    try:
        adapted = for_whole_images(found, image_size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    names = {"left": [*left, *adapted.left], "fresh": [*adapted.fresh], "resized": [*adapted.resized]}
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


def _from_run(path: Path) -> tuple[Pretrained, dict[str, Any], list[str]]:
    recipe: RunConfig
    model: Any
    if is_evaluation(path):
        recipe, model, checkpoint = load_trained(path)
        backbone = model.encoder if isinstance(model, Classifier) else model.backbone.encoder
        prefix = "encoder." if isinstance(model, Classifier) else "backbone.encoder."
    else:
        recipe, model, checkpoint = load_run(path)
        backbone, prefix = model.backbone(), "encoder."
    inside = {f"{prefix}{key}" for key in backbone.state_dict()}
    left = [key for key in model.state_dict() if key not in inside and not key.startswith("encoder.cls_token_mlp.")]
    state = checkpoint / STATE
    told = {
        "format": "run",
        "recipe": recipe.name,
        "step": json.loads(state.read_text())["step"] if state.is_file() else None,
        "sha256": file_sha256(checkpoint / MANIFEST),
    }
    return backbone, told, left


def _exported(path: Path) -> tuple[Pretrained, dict[str, Any], list[str]]:
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: family: say of which an official file is, one of {', '.join(FAMILIES)}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None
    if RECIPE not in metadata:
        what = "is timm's" if "architecture" in metadata else "tells no recipe"
        raise UserError(
            f"{path}: {what}; give what `ummim export --format safetensors` wrote, or family for an official file"
        )
    try:
        recipe = build_recipe(json.loads(metadata[RECIPE]), {}, path)
    except (ValueError, UserError) as error:
        raise UserError(f"{path}: its metadata hold no recipe of this version: {error}") from None
    if not isinstance(recipe, Recipe):
        raise UserError(f"{path}: was exported from an evaluation; give the pre-training's weights")
    method = recipe.method.for_inference().build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)
    backbone: Any = method.backbone()
    if faults := key_faults(tensors, {key: tuple(value.shape) for key, value in backbone.state_dict().items()}):
        raise UserError(f"{path}: the tensors do not fit its recipe: {faults}")
    backbone.load_state_dict(tensors)
    return backbone, {"format": "export", "recipe": recipe.name, "step": None, "sha256": file_sha256(path)}, []


def _official(path: Path, family: str, sizes: dict[str, Any]) -> tuple[Pretrained, dict[str, Any], list[str]]:
    if family not in FAMILIES:
        raise UserError(f"{path}: family = {family!r} is not supported; supported are: {', '.join(FAMILIES)}")
    told = {"format": "official", "recipe": family, "step": None, "sha256": file_sha256(path)}
    try:
        tensors, args = read_checkpoint(path)
        if "head.weight" in tensors:  # fine-tuned
            return _fine_tuned(path, family, tensors, sizes), told, [key for key in tensors if _of_head(key)]
        encoder, used = _encoder_of(family, tensors, args, sizes)
    except ValueError as error:  # OfficialError
        raise CheckpointError(f"{path}: {error}") from None
    return encoder, told, [key for key in tensors if key not in used]


def _fine_tuned(path: Path, family: str, tensors: Tensors, sizes: dict[str, Any]) -> Pretrained:
    if family not in CLASSIFIERS:
        raise UserError(f"{path}: is fine-tuned, which is read for {', '.join(CLASSIFIERS)} only, not {family}")
    return load_official_classifier(family, tensors, len(tensors["head.weight"]), **sizes).encoder


def _of_head(key: str) -> bool:
    return key.startswith(("fc_norm.", "head."))


def _encoder_of(
    family: str, tensors: Tensors, args: Mapping[str, Any], sizes: dict[str, Any]
) -> tuple[Pretrained, set[str]]:
    """The encoder of the family's model, and the official keys that it uses; the decoder, which many published files
    lack, is not looked at. Raises OfficialError."""
    kind = FAMILIES[family]
    sizes = collect_sizes(family, kind.sizes, sizes, args, kind.norm_pix)
    sizes.setdefault("decoder_num_heads", 1)  # which fits every decoder
    with torch.device("meta"):  # shapes only
        model: Any = kind.build(tensors, sizes)
    names = {official: ours for official, ours in kind.names(model).items() if ours.startswith("encoder.")}
    own, sections = model.state_dict(), {_section(key) for key in names}
    fixed = {key for key in kind.constants(model) if _section(key) in sections}
    given = {key: value for key, value in tensors.items() if _section(key) in sections and key not in fixed}
    check_keys(f"{family}'s encoder", given, {key: kind.shape(key, own[ours].shape) for key, ours in names.items()})
    assign(model.encoder, tensors, {key: ours.removeprefix("encoder.") for key, ours in names.items()})
    return model.encoder, {*names, *fixed}


def _section(key: str) -> str:
    """The part of a model that an official key belongs to, such as ``blocks`` or ``encoder.layers``."""
    parts = key.split(".")
    return ".".join(parts[: 2 if parts[0] in ("encoder", "backbone") else 1])
