"""The numerical check of an export: it is loaded back by the library it is for and compared on fixed images."""

import math
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ummim import __version__
from ummim.backbones.sparse_swin import SparseSwin
from ummim.downstream.classify import Classifier
from ummim.downstream.probe import Probe
from ummim.errors import UserError
from ummim.interop.official import load_official
from ummim.interop.trusted import from_pretrained_arguments, plain_folder, timm_model
from ummim.masking import MaskPlan
from ummim.methods.api import Method
from ummim.nn.targets import patchify

TOLERANCE = 1e-5  # of the largest value of an output
VIT_EPS = 1e-6  # of the norms of timm's ViTs and BEiTs
SAMPLES = 64  # values of an output that a certificate keeps
IMAGES = 2
ARCHITECTURES = (
    "ViTMAEForPreTraining",
    "SwinForMaskedImageModeling",
    "ViTModel",
    "BeitModel",
    "SwinModel",
    "ViTForImageClassification",
    "BeitForImageClassification",
    "SwinForImageClassification",
)
NEEDS_TRANSFORMERS = (
    "a Hugging Face export is checked with transformers, which is not installed: pip install 'ummim[huggingface]'"
)

Outputs = dict[str, Tensor]


class ExportFailed(Exception):
    """What was written does not agree with the model, or is not taken by the library: ours to mend."""


class Target(NamedTuple):
    """What was exported, as far as loading it again needs to know.

    Attributes:
        form: safetensors, timm, official or huggingface.
        model: the encoder's class, timm's model, the official family or the class of transformers.
        image_size: side of the images it takes, in pixels.
        arguments: keywords of whatever loads it.
        norm_eps: huggingface: what each norm's eps is set to after loading, if the config cannot say it.
        outputs: what is compared.
    """

    form: str
    model: str
    image_size: int
    arguments: dict[str, Any]
    norm_eps: float | None = None
    outputs: tuple[str, ...] = ("features",)


def fixed_images(size: int, count: int = IMAGES) -> Tensor:
    """(count, 3, size, size) float32: a sine of growing frequency, the same on every machine and in every release."""
    places = np.arange(count * 3 * size * size, dtype=np.float64)
    return torch.from_numpy(np.sin(1e-3 * places**2)).float().view(count, 3, size, size)


def fixed_noise(tokens: int, count: int = IMAGES) -> Tensor:
    """(count, tokens) float32, all different in a row: the patches with the least noise stay visible."""
    places = np.arange(count * tokens, dtype=np.float64).reshape(count, tokens)
    return torch.from_numpy(places * (math.sqrt(5) - 1) / 2 % 1).float()


def fixed_mask(tokens: int, visible: int, count: int = IMAGES) -> Tensor:
    """(count, tokens) bool, True where masked: MAE's masks of ``fixed_noise``."""
    order = fixed_noise(tokens, count).argsort(dim=1)
    return torch.ones(count, tokens, dtype=torch.bool).scatter(1, order[:, :visible], False)


@torch.no_grad()
def our_outputs(model: Method | Classifier | Probe, target: Target) -> Outputs:
    """What our model makes of the fixed images."""
    model.eval()
    images, outputs = fixed_images(target.image_size), {}
    if isinstance(model, Classifier | Probe):
        return {"logits": model(images)}
    if "features" in target.outputs:
        outputs["features"] = tokens_of(model.backbone(), images, target.form == "huggingface")
    if "loss" in target.outputs:
        tokens = model.grid[0] * model.grid[1]
        mask = fixed_mask(tokens, visible_tokens(tokens, target.arguments))
        found = model(images, MaskPlan.from_mask(mask))
        outputs |= {"loss": found.loss, "masked": found.prediction[mask]}
    if "weights" in target.outputs:
        outputs["weights"] = means(model)
    return outputs


@torch.no_grad()
def loaded_outputs(target: Target, path: Path) -> Outputs:
    """What the export at ``path``, a file or a folder, makes of them, loaded by the library it is for.

    Raises:
        UserError: transformers is needed and not installed, or what is stated is not what an export of ours states.
        ExportFailed: the library does not take the tensors.
    """
    loaders = {"safetensors": _ours, "timm": _timm, "official": _official, "huggingface": _huggingface}
    return loaders[target.form](target, path)


def visible_tokens(tokens: int, arguments: dict[str, Any]) -> int:
    """How many patches stay visible: of MAE's class by its mask_ratio, else half."""
    return int(tokens * (1 - arguments.get("mask_ratio", 0.5)))


def tokens_of(encoder: nn.Module, images: Tensor, normed: bool = False) -> Tensor:
    """(B, n, C): an encoder's output; ``normed``: after a fresh final norm, if it has none of its own."""
    output = encoder.eval()(images)
    tokens = output if output.ndim == 3 else output.flatten(1, 2)  # pyramids give (B, h, w, C)
    if normed and isinstance(encoder.norm, nn.Identity):
        return nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
    return tokens


def means(method: Method) -> Tensor:
    """(tensors,) float64: the mean of every tensor, by its name in order."""
    state = method.state_dict()
    return torch.stack([state[key].double().mean() for key in sorted(state)])


def compare(found: Outputs, expected: Outputs) -> dict[str, Any]:
    """The differences, as a certificate holds them, with evenly spaced values of ``expected``."""
    outputs: dict[str, Any] = {}
    for name, ours in expected.items():
        theirs = found[name]
        same_shape = theirs.shape == ours.shape
        outputs[name] = {
            "shape": list(ours.shape),
            "max_abs_difference": float((theirs - ours).abs().max()) if same_shape else float("inf"),
            "largest": float(ours.abs().max()),
            "sample": sample(ours),
        }
    return _judged(outputs)


def compare_samples(found: Outputs, check: dict[str, Any]) -> dict[str, Any]:
    """The differences from the values that a certificate kept."""
    outputs: dict[str, Any] = {}
    for name, kept in check["outputs"].items():
        theirs = found[name]
        difference = float("inf")
        if list(theirs.shape) == kept["shape"]:
            pairs = zip(sample(theirs), kept["sample"], strict=True)
            largest = abs(float(theirs.abs().max()) - kept["largest"])  # it scales the tolerance, so it is compared too
            difference = _most([largest, *(abs(a - b) for a, b in pairs)])
        outputs[name] = {**kept, "max_abs_difference": difference}
    return _judged(outputs)


def _most(values: list[float]) -> float:
    """The largest; NaN if any is."""
    return float(np.max(values))


def sample(output: Tensor) -> list[float]:
    """At most SAMPLES evenly spaced values."""
    flat = output.flatten()
    places = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel())).round().long()
    return [float(value) for value in flat[places]]


def _judged(outputs: dict[str, Any]) -> dict[str, Any]:
    fits = [each["max_abs_difference"] <= TOLERANCE * each["largest"] for each in outputs.values()]  # not NaN
    return {
        "outputs": outputs,
        "max_abs_difference": max(each["max_abs_difference"] for each in outputs.values()),
        "tolerance": TOLERANCE,
        "passed": all(fits),
    }


def library(target: Target) -> str:
    """Name and version of what loads it."""
    name = {"timm": "timm", "huggingface": "transformers"}.get(target.form)
    return f"ummim {__version__}" if name is None else f"{name} {version(name)}"


def _ours(target: Target, path: Path) -> Outputs:
    from ummim.interop.source import exported_encoder, exported_evaluation

    if "logits" in target.outputs:
        return {"logits": exported_evaluation(path)(fixed_images(target.image_size))}
    return {"features": tokens_of(exported_encoder(path), fixed_images(target.image_size))}


def _timm(target: Target, path: Path) -> Outputs:
    with safe_open(path, "pt") as file:
        name, kwargs, eps = timm_model(path, file.metadata() or {})
    if name.startswith("swin") or eps != VIT_EPS:
        kwargs["norm_layer"] = partial(nn.LayerNorm, eps=eps)
    model: Any = timm.create_model(name, pretrained=False, **kwargs).eval()
    model.load_state_dict(load_file(path), strict=True)
    if "logits" in target.outputs:
        return {"logits": model(fixed_images(target.image_size))}
    output = model.forward_features(fixed_images(target.image_size))
    return {"features": output if output.ndim == 3 else output.flatten(1, 2)}


def _official(target: Target, path: Path) -> Outputs:
    method = load_official(target.model, path, **target.arguments)
    if isinstance(method.encoder, SparseSwin) and "features" not in target.outputs:
        return {"weights": means(method)}
    return {"features": tokens_of(method.backbone(), fixed_images(target.image_size)), "weights": means(method)}


def _from_pretrained(target: Target, path: Path) -> Any:
    try:
        import transformers
        from transformers.utils import logging
    except ImportError:
        raise UserError(NEEDS_TRANSFORMERS) from None
    if target.model not in ARCHITECTURES:  # a certificate may say anything
        raise UserError(f"{path}: {target.model!r} is no class that ummim exports to: {', '.join(ARCHITECTURES)}")
    kind = getattr(transformers, target.model)
    arguments = from_pretrained_arguments(path, target.arguments)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with plain_folder(path) as folder:
            model, info = kind.from_pretrained(folder, output_loading_info=True, **arguments)
    finally:
        if shown:
            logging.enable_progress_bar()
    if wrong := {key: sorted(map(str, value)) for key, value in info.items() if value}:
        raise ExportFailed(f"{target.model} does not take the tensors: {wrong}")
    for module in model.eval().modules():
        if target.norm_eps is not None and isinstance(module, nn.LayerNorm):
            module.eps = target.norm_eps
    return model


def _huggingface(target: Target, path: Path) -> Outputs:
    model = _from_pretrained(target, path)
    images = fixed_images(target.image_size)
    if target.model == "ViTMAEForPreTraining":
        tokens = (model.config.image_size // model.config.patch_size) ** 2
        mask = fixed_mask(tokens, visible_tokens(tokens, target.arguments))
        output = model(images, noise=fixed_noise(tokens))
        return {"loss": output.loss, "masked": output.logits[mask]}
    if target.model == "SwinForMaskedImageModeling":
        unit = model.config.encoder_stride
        side, times = target.image_size // unit, unit // model.config.patch_size
        mask = fixed_mask(side**2, visible_tokens(side**2, target.arguments))
        cells = mask.view(-1, side, side).repeat_interleave(times, 1).repeat_interleave(times, 2)
        output = model(images, bool_masked_pos=cells.flatten(1))
        return {"loss": output.loss, "masked": patchify(output.reconstruction, unit)[mask]}
    output = model(images)
    return {"logits": output.logits} if "logits" in target.outputs else {"features": output.last_hidden_state}
