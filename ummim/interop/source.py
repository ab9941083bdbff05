"""Weights to start from, of any kind, as an encoder of ours: the one place that both ``init`` of a pre-training and
``classify.weights`` of an evaluation read.

What can be read: a run's folder or one of its checkpoints, of a pre-training or an evaluation; what ``ummim export``
wrote; a folder of transformers; a file of timm's; an official file, of a pre-training or fine-tuned.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ummim.backbones.table_swin import TableSwin
from ummim.checkpoint_file import key_faults, listed, read_checkpoint_file
from ummim.downstream.adapt import Encoder, Pretrained
from ummim.downstream.classify import Classifier
from ummim.downstream.probe import Probe
from ummim.downstream.recipe import ClassifyRecipe
from ummim.downstream.task import build_model, encoder_from_scratch
from ummim.downstream.trained import load_any
from ummim.engine.checkpoint import MANIFEST, STATE
from ummim.errors import UserError
from ummim.interop.certificate import read_json
from ummim.interop.classifier import CLASSIFIERS, fine_tuned_classes, load_official_classifier
from ummim.interop.from_huggingface import from_huggingface, weights_file
from ummim.interop.from_timm import from_timm, is_timm
from ummim.interop.huggingface import CONFIG
from ummim.interop.official import FAMILIES, load_official, read_checkpoint
from ummim.interop.official_encoder import encoder_of, has_decoder, is_size, order_merges
from ummim.interop.timm import TIMM_VITS
from ummim.interop.told import certificate_of, certified_sizes, refuse_guesses
from ummim.methods.api import Method
from ummim.recipe import Recipe
from ummim.recipe_file import build_recipe

RECIPE = "ummim_recipe"  # of an exported file's metadata


class Source(NamedTuple):
    """What is at a path.

    Attributes:
        form: run, export, official, huggingface or timm.
        what: it, in a few words.
        recipe: name of the recipe, the official family, or the class of another library.
        encoder: ours, with the weights, on the CPU.
        rest: other tensors, under the names of the method that they are of.
        left: names, there, of tensors that have no place in any method.
        step: of a run.
        identity: the file by whose hash the source is known.
        decoder_heads: attention heads of the decoder in ``rest``; None: there is none with attention.
        untold: names of the encoder's sizes that nothing there tells.
    """

    form: str
    what: str
    recipe: str
    encoder: Pretrained
    rest: dict[str, Tensor]
    left: list[str]
    step: int | None
    identity: Path
    decoder_heads: int | None = None
    untold: tuple[str, ...] = ()


def read_source(path: Path, family: str | None, sizes: Mapping[str, Any], whole: bool = False) -> Source:
    """The encoder at ``path``, and what else is there.

    Args:
        path: a file or a folder.
        family: of an official file, a key of ``FAMILIES``; else None.
        sizes: of an official file, where neither tensors nor a certificate of it tell: see ``load_official``.
        whole: of an official pre-training with its decoder, read that, too; and ``sizes``, a recipe's, may differ
            from the certificate's, which stand.

    Raises:
        UserError: nothing there, something else, tensors and sizes that do not fit each other, or an official file
            of no published size of which nothing tells the heads or the window.
    """
    if path.is_dir():
        if family is not None:
            raise UserError(f"{path}: family = {family!r} is for official files; a folder says what it is")
        return _huggingface(path) if (path / CONFIG).is_file() else _run(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; name a run, a folder of transformers, or a file of ummim "
                        "export, timm or an official code")  # fmt: skip
    if family is not None:
        return _official(path, family, sizes, whole)
    tensors, metadata = _read_file(path)
    if RECIPE in metadata:
        return _exported(path, tensors, metadata)
    if not is_timm(tensors):
        raise UserError(
            f"{path}: is neither of ummim export nor a timm ViT, BEiT or Swin (it holds {listed(list(tensors), 3)}); "
            f"of an official file, name the family: one of {', '.join(FAMILIES)}"
        )
    try:
        found = from_timm(tensors, metadata, str(path))
    except UserError as error:
        raise UserError(f"{error}; of an official file, name the family") from None
    told = "kwargs" in metadata or isinstance(found.encoder, TableSwin) or _is_timms(found.encoder)
    untold = () if told else ("num_heads",)
    return Source("timm", found.what, found.what, found.encoder, found.rest, found.left, None, path, untold=untold)


def _is_timms(vit: Any) -> bool:
    """Whether a ViT has the size of one of timm's."""
    config = vit.config
    return (config.patch_size, config.embed_dim, config.depth, config.num_heads) in TIMM_VITS


def exported_encoder(path: Path) -> Pretrained:
    """The encoder of a safetensors file that ``ummim export`` wrote, on the CPU, in eval mode.

    Raises:
        UserError: a file of another kind, or tensors that do not fit its recipe.
    """
    tensors, metadata = _read_file(path)
    if RECIPE not in metadata:
        raise UserError(f"{path}: holds no recipe: it was not written by ummim export --format safetensors")
    return _exported(path, tensors, metadata).encoder.eval()


def exported_evaluation(path: Path) -> Classifier | Probe:
    """The classifier or probe of a safetensors file that ``ummim export`` wrote, on the CPU, in eval mode.

    Raises:
        UserError: a file of another kind, or tensors that do not fit its recipe.
    """
    tensors, metadata = _read_file(path)
    recipe = _recipe(path, metadata) if RECIPE in metadata else None
    if not isinstance(recipe, ClassifyRecipe):
        raise UserError(f"{path}: holds no evaluation: it was not written by ummim export of one")
    return _evaluation(path, recipe, tensors)


def _run(path: Path) -> Source:
    recipe, model, checkpoint = load_any(path)
    encoder, rest, left = _split(model) if isinstance(model, Classifier | Probe) else (*_parts(model), [])
    step = json.loads((checkpoint / STATE).read_text())["step"] if (checkpoint / STATE).is_file() else None
    identity, heads = checkpoint / MANIFEST, decoder_heads(model)
    return Source("run", f"run {checkpoint.name}", recipe.name, encoder, rest, left, step, identity, heads)


def decoder_heads(model: torch.nn.Module) -> int | None:
    """Attention heads of a method's decoder, or of its decoders, which have the same; None without any."""
    found = (getattr(module, "num_heads", None) for name, module in model.named_modules() if name.startswith("decoder"))
    return next((heads for heads in found if heads is not None), None)


def _parts(method: Method) -> tuple[Any, dict[str, Tensor]]:
    """The encoder, and the other tensors but those of a frozen teacher."""
    frozen = method.frozen()
    teacher = [f"{name}." for name, child in method.named_children() if child is frozen]
    outside = ("encoder.", *teacher)
    return method.encoder, {key: value for key, value in method.state_dict().items() if not key.startswith(outside)}


def _split(model: Classifier | Probe) -> tuple[Encoder, dict[str, Tensor], list[str]]:
    """The encoder of an evaluation's model, nothing of a method, and the names of what is left."""
    classifier, prefix = (model, "") if isinstance(model, Classifier) else (model.backbone, "backbone.")
    return classifier.encoder, {}, [key for key in model.state_dict() if not key.startswith(f"{prefix}encoder.")]


def _recipe(path: Path, metadata: Mapping[str, str]) -> Recipe | ClassifyRecipe:
    try:
        return build_recipe(json.loads(metadata[RECIPE]), {}, path)
    except (ValueError, UserError) as error:
        raise UserError(f"{path}: its metadata hold no recipe of this version: {error}") from None


def _evaluation(path: Path, recipe: ClassifyRecipe, tensors: dict[str, Tensor]) -> Classifier | Probe:
    model = build_model(recipe, encoder_from_scratch(recipe))
    if faults := key_faults(tensors, {key: tuple(value.shape) for key, value in model.state_dict().items()}):
        raise UserError(f"{path}: the tensors do not fit its recipe: {faults}")
    model.load_state_dict(tensors)
    return model.eval()


def _exported(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Source:
    recipe = _recipe(path, metadata)
    if isinstance(recipe, ClassifyRecipe):
        parts = _split(_evaluation(path, recipe, tensors))
        return Source("export", "exported evaluation", recipe.name, *parts, None, path)
    method = recipe.method.for_inference().build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)
    encoder: Any = method.backbone()
    if faults := key_faults(tensors, {key: tuple(value.shape) for key, value in encoder.state_dict().items()}):
        raise UserError(f"{path}: the tensors do not fit its recipe: {faults}")
    encoder.load_state_dict(tensors)
    return Source("export", "exported encoder", recipe.name, encoder, {}, [], None, path)


def _huggingface(path: Path) -> Source:
    found, identity = from_huggingface(path), weights_file(path)
    attends = any(key.startswith("decoder.blocks.") for key in found.rest)
    heads = int(read_json(path / CONFIG).get("decoder_num_attention_heads", 16)) if attends else None  # theirs: 16
    return Source("huggingface", found.what, found.what, found.encoder, found.rest, found.left, None, identity, heads)


def _official(path: Path, family: str, sizes: Mapping[str, Any], whole: bool) -> Source:
    if family not in FAMILIES:
        raise UserError(f"{path}: family = {family!r} is not supported; supported are: {', '.join(FAMILIES)}")
    rest: dict[str, Tensor] = {}
    encoder: Any
    heads: int | None = None
    untold: tuple[str, ...] = ()
    certificate = certificate_of(path)
    sizes = certified_sizes(path, family, certificate, sizes, override=whole)
    try:
        tensors, args = read_checkpoint(path)
        if (classes := fine_tuned_classes(family, tensors)) is not None:
            known = {key: value for key, value in sizes.items() if not whole or is_size(family, key)}
            encoder = load_official_classifier(family, tensors, classes, **known).encoder
            left = [key for key in tensors if key.startswith(CLASSIFIERS[family].head)]
            untold = ("window_size", "sr_ratios") if whole else ()  # a recipe's, which may be of a compact grid
        elif whole and has_decoder(family, tensors):
            method = load_official(family, tensors, **sizes)
            (encoder, rest), heads, left = _parts(method), decoder_heads(method), []
        else:
            encoder, used = encoder_of(family, tensors, args, sizes)
            left = [key for key in tensors if key not in used]
    except ValueError as error:  # OfficialError
        raise UserError(f"{path}: {error}") from None
    refuse_guesses(path, encoder, sizes)
    order_merges(encoder, certificate)
    return Source("official", f"official {family}", family, encoder, rest, left, None, path, heads, untold)


def _read_file(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors of a file, bare or under ``model`` or ``state_dict``, and its metadata."""
    metadata: Mapping[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            return load_file(path), metadata
        held = read_checkpoint_file(str(path))
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None
    except ValueError as error:
        raise UserError(f"{path} {error}") from None
    inner: Any = next((held[key] for key in ("model", "state_dict") if isinstance(held.get(key), Mapping)), held)
    return {key: tensor for key, tensor in inner.items() if isinstance(tensor, Tensor)}, metadata
