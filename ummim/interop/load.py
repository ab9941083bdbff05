"""Weights to start from: any format of ours or of others into a method, for continued pre-training.

Tensors are brought under our method's names, in the order of its merges, and copied where they fit.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ummim.checkpoint_file import listed, read_checkpoint_file
from ummim.errors import UserError
from ummim.interop.certificate import certificate_path, read_json
from ummim.interop.huggingface import CONFIG
from ummim.interop.huggingface import WEIGHTS as HUGGINGFACE_WEIGHTS
from ummim.interop.huggingface_names import (
    BEIT,
    SWIN,
    VIT,
    Theirs,
    encoder_names,
    from_theirs,
    mae_names,
    prefixed,
    simmim_names,
)
from ummim.interop.official import FAMILIES, load_official
from ummim.interop.official_sizes import official_sizes
from ummim.interop.run import load_run
from ummim.interop.timm import merges_by_rows, turn_merges
from ummim.methods.api import Method
from ummim.methods.simmim import SimMIM
from ummim.recipe import Recipe
from ummim.recipe_file import build_recipe

PREFIXES = {"vit_mae": "vit.", "vit": "vit.", "beit": "beit.", "swin": "swin."}
BLOCKS = ("encoder.blocks.", "encoder.layers.", "encoder.stages.")
KINDS = {"vit_mae": VIT, "vit": VIT, "beit": BEIT, "swin": SWIN}


class Report(NamedTuple):
    """What became of the tensors of a file.

    Attributes:
        source: what was read.
        used: keys of the method that were loaded.
        missing: keys of the method that the file does not have: they keep their fresh values.
        left_over: keys of the file that the method has no place for.
    """

    source: str
    used: tuple[str, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]

    def line(self) -> str:
        """One line for the log."""
        parts = [f"{len(self.used)} tensors of {self.source} loaded"]
        for what, keys in (("fresh, as it has none of them", self.missing), ("left over there", self.left_over)):
            parts.append(f"{what}: {len(keys)} ({listed(keys, 6)})" if keys else f"{what}: none")
        return "; ".join(parts)


class _Source(NamedTuple):
    what: str
    tensors: dict[str, Tensor]  # under our method's names
    by_rows: bool  # its merges join 2x2 tokens row by row
    left_over: list[str]


def load_init(method: Method, path: str | Path, family: str | None = None) -> Report:
    """Copy the weights of ``path`` into ``method``, encoder and, where they are there, all else that fits by name.

    Args:
        method: the method, on any device; a frozen teacher is left alone.
        path: a run's folder or one of its checkpoints, a file of ``ummim export`` (safetensors or timm), a folder of
            transformers, an official file, or a file of timm's for the same kind of encoder.
        family: of an official file.

    Raises:
        UserError: nothing there, an unknown format, no weight of the encoder in it, or tensors of another shape.
        OSError: a file that cannot be opened.
    """
    source = _plain_class_token(method, _read(method, Path(path), family))
    own = {key: value for key, value in method.state_dict().items() if not _is_frozen(method, key)}
    tensors = source.tensors
    if source.by_rows != merges_by_rows(method.encoder):
        tensors = _turned(tensors)
    used = [key for key in own if key in tensors]
    if not any(key.startswith(BLOCKS) for key in used):
        raise UserError(
            f"{path}: {source.what} has no block of this recipe's {type(method.encoder).__name__}; "
            f"found: {listed(list(tensors) or source.left_over, 3)}"
        )
    for key in used:
        if tensors[key].shape != own[key].shape:
            encoder = key.startswith("encoder.")
            remedy = "" if encoder else ", or start from a file of the encoder alone (ummim export)"
            raise UserError(
                f"{path}: {key} is {tuple(tensors[key].shape)} there and {tuple(own[key].shape)} in this recipe: "
                f"give the recipe the sizes of those weights{remedy}"
            )
    with torch.no_grad():
        for key in used:
            own[key].copy_(tensors[key])
    left = [*source.left_over, *(key for key in tensors if key not in own)]
    missing = tuple(key for key in own if key not in tensors)
    return Report(f"{source.what} {path}", tuple(used), missing, tuple(left))


def exported_encoder(path: Path) -> nn.Module:
    """The encoder of a safetensors file that ``ummim export`` wrote, on the CPU, in eval mode.

    Raises:
        UserError: a file of another kind, or tensors that do not fit its recipe.
    """
    tensors, metadata = _read_safetensors(path)
    if "ummim_recipe" not in metadata:
        raise UserError(f"{path}: holds no recipe: it was not written by ummim export --format safetensors")
    recipe = _recipe(metadata, path)
    encoder = recipe.method.for_inference().build(recipe.data.image_size, recipe.partial, False).backbone()
    try:
        encoder.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path}: its tensors do not fit its recipe: {' '.join(str(error).split())}") from None
    return encoder.eval()


def _read(method: Method, path: Path, family: str | None) -> _Source:
    if path.is_dir():
        return _huggingface(path, method) if (path / CONFIG).is_file() else _run(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a run's folder, an exported file or an official one")
    if family is not None:
        if family not in FAMILIES:
            raise UserError(f"family {family!r} is not supported; supported are: {', '.join(FAMILIES)}")
        return _official(method, path, family)
    if path.suffix != ".safetensors":
        return _timm(_read_file(path), f"{path}: is no timm encoder; of an official file, name the family", method)
    tensors, metadata = _read_safetensors(path)
    if "ummim_recipe" in metadata:
        by_rows = bool(getattr(_recipe(metadata, path).method, "row_major_merge", False))
        return _Source("exported encoder", _below("encoder.", tensors), by_rows, [])
    return _timm(tensors, f"{path}: is neither of ummim export nor a timm encoder; of an official file, name the "
                 "family", method)  # fmt: skip


def _run(path: Path) -> _Source:
    _, method, checkpoint = load_run(path)
    return _of_method(method, f"run {checkpoint.name} of")


def _official(method: Method, path: Path, family: str) -> _Source:
    source = _of_method(load_official(family, path, **official_sizes(method, family)), f"official {family}")
    certified = read_json(certificate_path(path)).get("recipe", {}).get("method", {})
    if "row_major_merge" in certified:  # of an export of ours, which may have the order of the official fine-tuning
        return source._replace(by_rows=bool(certified["row_major_merge"]))
    return source


def _of_method(method: Method, what: str) -> _Source:
    state = {key: value for key, value in method.state_dict().items() if not _is_frozen(method, key)}
    return _Source(what, state, merges_by_rows(method.encoder), [])


def _timm(tensors: Mapping[str, Tensor], otherwise: str, method: Method) -> _Source:
    """timm's names are ours. A head, and what else only timm has, is left over."""
    known = method.encoder.state_dict()
    ours = {key: tensor for key, tensor in tensors.items() if key in known}
    if not any(key.startswith(("blocks.", "layers.")) for key in ours):
        raise UserError(f"{otherwise}: one of {', '.join(FAMILIES)}")
    return _Source("timm encoder", _below("encoder.", ours), False, [key for key in tensors if key not in known])


def _huggingface(path: Path, method: Method) -> _Source:
    try:
        config = json.loads((path / CONFIG).read_text())
    except ValueError as error:
        raise UserError(f"{path / CONFIG}: is no JSON: {error}") from None
    kind = config.get("model_type")
    if kind not in KINDS:
        raise UserError(f"{path / CONFIG}: model_type = {kind!r}: can be read are {', '.join(KINDS)}")
    weights = path / HUGGINGFACE_WEIGHTS
    tensors = _read_safetensors(weights)[0] if weights.is_file() else _read_file(path / "pytorch_model.bin")
    # As transformers 5 saves an MAE's decoder; the hub's files have the other name.
    held = {
        key.replace("decoder_encoder.layer.", "decoder_layers."): tensor
        for key, tensor in tensors.items()
        if not key.endswith("relative_position_index")
    }
    if kind == "swin" and "decoder.0.weight" in held:
        held["decoder.0.weight"] = held["decoder.0.weight"].flatten(1)  # a 1x1 convolution
    joined, left = from_theirs(
        held, _huggingface_names(method, kind, any(key.startswith(PREFIXES[kind]) for key in held))
    )
    return _Source(f"transformers' {config.get('architectures', [kind])[0]}", joined, False, left)


def _huggingface_names(method: Method, kind: str, below: bool) -> dict[str, Theirs]:
    """The names of what a model of the kind may hold of the method; ``below``: under the encoder's prefix."""
    names: dict[str, Theirs] = {}
    for key in method.encoder.state_dict():
        with suppress(KeyError):  # what only our encoders have
            parts = encoder_names([key], KINDS[kind])
            names[f"encoder.{key}"] = (prefixed(PREFIXES[kind], parts) if below else parts)[key]
    for key in method.state_dict():
        if kind == "vit_mae" and not key.startswith("encoder."):
            with suppress(KeyError):
                names |= mae_names([key])
    return names | simmim_names() if kind == "swin" and isinstance(method, SimMIM) else names


def _turned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    inner = {key.removeprefix("encoder."): value for key, value in tensors.items() if key.startswith("encoder.")}
    return {**tensors, **_below("encoder.", turn_merges(inner))}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def _plain_class_token(method: Method, source: _Source) -> _Source:
    """Without the class token of a plain ViT where the method's own passes an MLP first (TEC's)."""
    key, mlp = "encoder.cls_token", "encoder.cls_token_mlp."
    if key not in source.tensors or any(name.startswith(mlp) for name in source.tensors):
        return source
    if not any(name.startswith(mlp) for name in method.state_dict()):
        return source
    tensors = {name: tensor for name, tensor in source.tensors.items() if name != key}
    return source._replace(tensors=tensors, left_over=[*source.left_over, key])


def _is_frozen(method: Method, key: str) -> bool:
    frozen = method.frozen()
    return frozen is not None and any(child is frozen and key.startswith(f"{name}.") for name, child in
                                      method.named_children())  # fmt: skip


def _recipe(metadata: Mapping[str, str], path: Path) -> Recipe:
    recipe = build_recipe(json.loads(metadata["ummim_recipe"]), {}, path)
    if not isinstance(recipe, Recipe):
        raise UserError(f"{path}: is a classifier's; continued pre-training starts from an encoder")
    return recipe


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        held = read_checkpoint_file(str(path))
    except ValueError as error:
        raise UserError(f"{path} {error}") from None
    inner: Any = next((held[key] for key in ("model", "state_dict") if isinstance(held.get(key), Mapping)), held)
    return {key: tensor for key, tensor in inner.items() if isinstance(tensor, Tensor)}
