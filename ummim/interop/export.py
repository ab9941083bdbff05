"""``ummim export``: a trained method to what other programs read, with a certificate and a model card beside it.

Everything is written into a hidden folder beside the target, loaded back from there and compared; only what agrees gets
its name.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from ummim.atomic import write_text
from ummim.backbones.sparse_swin import SparseSwin
from ummim.downstream.classify import Classifier
from ummim.downstream.probe import Probe
from ummim.errors import UserError
from ummim.interop.certificate import (
    card_path,
    certificate_path,
    difference_line,
    local_index,
    make_certificate,
    read_json,
    run_folder,
    source_of,
)
from ummim.interop.check import NEEDS_TRANSFORMERS, ExportFailed, Target, compare, loaded_outputs, our_outputs
from ummim.interop.huggingface import HuggingFaceModel, to_huggingface, write_folder
from ummim.interop.huggingface_classifier import classifier_to_huggingface
from ummim.interop.model_card import model_card
from ummim.interop.official import family_of, save_official
from ummim.interop.official_sizes import official_sizes
from ummim.interop.publish import check_folder, is_halfway, mend, publish_folder
from ummim.interop.timm import export_timm, save_timm, write_timm
from ummim.interop.timm_classifier import classifier_to_timm
from ummim.methods.api import Method
from ummim.recipe import Recipe
from ummim.recipe_file import to_dict
from ummim.run_config import RunConfig

FOLDED = "the probe's normalisation of its features, by their mean and variance in training, is part of the head"
FORMATS = ("safetensors", "timm", "official", "huggingface")


class Exported(NamedTuple):
    """An export that agrees with its model: where it is, and the result of the check in one line, then the notes."""

    path: Path
    line: str


class _Written(NamedTuple):
    target: Target
    notes: tuple[str, ...] = ()


def export(
    recipe: RunConfig,
    model: Method | Classifier | Probe,
    checkpoint: Path,
    out: Path,
    form: str,
    encoder_only: bool = False,
) -> Exported:
    """Write ``model`` to ``out``, check it, and write certificate and model card.

    Args:
        recipe: of the run.
        model: with the checkpoint's weights, on the CPU.
        checkpoint: the step folder that they come from.
        out: the file to write; for huggingface, the folder, in which only an earlier export is replaced.
        form: one of ``FORMATS``.
        encoder_only: huggingface: the encoder, even where transformers has the whole model.

    Raises:
        UserError: a format that does not exist for this model, or a target that is something else.
        ExportFailed: what was written does not agree with the model; nothing is left behind.
    """
    if encoder_only and form != "huggingface":
        raise UserError(f"--model encoder goes with --format huggingface; --format {form} leaves no choice")
    _check_target(out, form)
    place = out.resolve() if form == "huggingface" else out  # of a link to a folder, the folder
    place.parent.mkdir(parents=True, exist_ok=True)
    staging = place.with_name(f".{place.name}.partial")
    mend(staging, place)
    shutil.rmtree(staging, ignore_errors=True)
    staged = staging / out.name
    try:
        staging.mkdir()
        line = _stage(recipe, model, checkpoint, staged, out, form, encoder_only)
        if staged.is_dir():
            publish_folder(staged, place)
        else:
            _publish_file(staged, out)
    finally:
        if not is_halfway(staging):
            shutil.rmtree(staging, ignore_errors=True)
    return Exported(out, line)


def _stage(
    recipe: RunConfig,
    model: Method | Classifier | Probe,
    checkpoint: Path,
    staged: Path,
    out: Path,
    form: str,
    encoder_only: bool,
) -> str:
    """Write all that ``out`` is to be to ``staged``, and check it; the result, and the notes, in lines."""
    written = _write(recipe, model, checkpoint, staged, form, encoder_only)
    for file in staged.rglob("*") if staged.is_dir() else [staged]:
        file.chmod(0o644)  # safetensors writes files that only their owner may read
    check = compare(loaded_outputs(written.target, staged), our_outputs(model, written.target))
    line = difference_line(written.target, check)
    if not check["passed"]:
        raise ExportFailed(f"{out}: was not written: {line}")
    encoder = model.backbone.encoder if isinstance(model, Probe) else model.encoder
    certificate = make_certificate(staged, written.target, written.notes, check, recipe, encoder, checkpoint)
    write_text(certificate_path(staged), json.dumps(certificate, indent=2) + "\n")
    run = run_folder(checkpoint)
    evaluation = {} if run is None else read_json(run / "evaluation.json")
    write_text(card_path(staged), model_card(certificate, evaluation))
    return "\n".join([line, *(f"note: {note}" for note in written.notes)])


def _write(
    recipe: RunConfig,
    model: Method | Classifier | Probe,
    checkpoint: Path,
    staged: Path,
    form: str,
    encoder_only: bool,
) -> _Written:
    """Write the export itself; what was written, for its check."""
    size = recipe.data.image_size
    if isinstance(model, Classifier | Probe):
        return _write_evaluation(recipe, model, checkpoint, staged, form)
    if form == "huggingface":
        assert isinstance(recipe, Recipe)
        return _write_folder(to_huggingface(model, _hidden_share(recipe), encoder_only), size, staged)
    if form == "official":
        family = family_of(model)
        if family is None:
            raise UserError(f"{type(model).__name__} has no official format; use --format safetensors")
        torch.save({"model": save_official(model, family)}, staged)
        return _official(model, family, size)
    encoder = model.backbone()
    if form == "timm":
        _, name, _ = export_timm(encoder)
        write_timm(encoder, staged)
        return _Written(Target(form, name, size, {}))
    tensors = {key: tensor.contiguous() for key, tensor in encoder.state_dict().items()}
    save_file(tensors, staged, {"format": "pt", "ummim_recipe": json.dumps(to_dict(recipe))})
    return _Written(Target(form, type(encoder).__name__, size, {}))


def _write_evaluation(
    recipe: RunConfig, model: Classifier | Probe, checkpoint: Path, staged: Path, form: str
) -> _Written:
    """A classifier, or a probe: whole in our own format, a linear one elsewhere as a classifier."""
    size, logits = recipe.data.image_size, ("logits",)
    if form == "safetensors":
        tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        save_file(tensors, staged, {"format": "pt", "ummim_recipe": json.dumps(to_dict(recipe))})
        return _Written(Target(form, type(model).__name__, size, {}, None, logits))
    if form == "official":
        raise UserError("a classifier goes as --format huggingface, timm or safetensors, not official")
    if isinstance(model, Probe) and model.attentive:
        raise UserError(
            f"an attentive probe pools tokens by a query of its own, which no model behind --format {form} does: "
            "use --format safetensors"
        )
    classifier, notes = (model.as_classifier(), (FOLDED,)) if isinstance(model, Probe) else (model, ())
    if form == "timm":
        tensors, name, kwargs = classifier_to_timm(classifier)
        save_timm(classifier, tensors, name, kwargs, staged)
        return _Written(Target(form, name, size, {}, None, logits), notes)
    names, unnamed = _class_names(recipe, checkpoint, classifier.head.out_features)
    written = _write_folder(classifier_to_huggingface(classifier, names), size, staged)
    return written._replace(notes=(*written.notes, *notes, *unnamed))


def _write_folder(converted: HuggingFaceModel, size: int, staged: Path) -> _Written:
    """A folder of transformers."""
    staged.mkdir()
    write_folder(converted, size, staged)
    config, outputs = converted.config, _compared(converted.architecture)
    arguments = converted.arguments | {key: config[key] for key in ("mask_ratio",) if key in config}
    target = Target("huggingface", converted.architecture, size, arguments, converted.norm_eps, outputs)
    return _Written(target, converted.notes)


def _class_names(recipe: RunConfig, checkpoint: Path, classes: int) -> tuple[list[str] | None, tuple[str, ...]]:
    """Of the training shards, where they are at hand and those of the run; else None, and a note of why."""
    index, digest = local_index(recipe.data.shards), source_of(recipe, checkpoint)["data_digest"]
    why = None
    if index is None:
        why = "the training shards, which name them, are not at hand"
    elif digest is None:
        why = "the checkpoint does not tell which shards it was trained on"
    elif index.digest != digest:
        why = f"the shards now have index digest {index.digest[:12]}, and the run's had {digest[:12]}"
    elif index.classes is None or len(index.classes) != classes:
        why = f"the training shards name {len(index.classes or ())} classes, and the head has {classes}"
    if why is not None:
        return None, (f"classes are numbers, not names: {why}",)
    assert index is not None
    return index.classes, ()


def _compared(architecture: str) -> tuple[str, ...]:
    """What is compared of a class of transformers."""
    if architecture in ("ViTMAEForPreTraining", "SwinForMaskedImageModeling"):
        return ("loss", "masked")
    return ("logits",) if architecture.endswith("ForImageClassification") else ("features",)


def _official(method: Method, family: str, size: int) -> _Written:
    """LocalMIM's Swin is written as its official fine-tuning reads it; its official pre-training code is another."""
    arguments = official_sizes(method, family)
    outputs: tuple[str, ...] = ("features", "weights")
    notes: tuple[str, ...] = ()
    if family == "local_mim_swin" and isinstance(method.encoder, SparseSwin) and not method.encoder.legacy_coordinates:
        outputs = ("weights",)
        notes = ("made for the official fine-tuning: the official pre-training code merges 2x2 tokens row by row and "
                 "places the tokens of stages 2 and 3 otherwise",)  # fmt: skip
    return _Written(Target("official", family, size, arguments, None, outputs), notes)


def _hidden_share(recipe: Recipe) -> float:
    """The share of patches that the encoder does not see."""
    attention = recipe.method.attention
    return recipe.mask.ratio if attention is None else attention.masked + attention.thrown


def _check_target(out: Path, form: str) -> None:
    """Refuse a target that is something else, before any work."""
    if not out.name:
        raise UserError(f"{out}: name the file or folder to write")
    if form == "huggingface":
        if out.exists() and not out.is_dir():
            raise UserError(f"{out}: is a file; name the folder to write")
        if out.is_dir():
            check_folder(out)
        try:
            import transformers  # noqa: F401
        except ImportError:
            raise UserError(NEEDS_TRANSFORMERS) from None
        return
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name the file to write")
    if (out.suffix == ".safetensors") == (form == "official"):
        expected = (
            "official files are torch's: end its name in .pth" if form == "official" else "end its name in .safetensors"
        )
        raise UserError(f"{out}: --format {form}: {expected}, by which other programs know what it is")


def _publish_file(staged: Path, out: Path) -> None:
    """Give the staged file its name, then certificate and card theirs; an earlier one's go first."""
    certificate_path(out).unlink(missing_ok=True)
    staged.replace(out)
    for path_of in (card_path, certificate_path):
        path_of(staged).replace(path_of(out))
