"""What a certificate must state before anything is done by it: see ``certificate.read_certificate``."""

import math
from pathlib import Path
from typing import Any

from ummim.interop.check import SAMPLES, Target
from ummim.interop.huggingface import CONFIG, WEIGHTS

FORMS = ("safetensors", "timm", "official", "huggingface")
OUTPUTS = ("features", "loss", "masked", "weights", "logits")


def check_statement(found: dict[str, Any]) -> None:
    """Look at all that the check of an export reads.

    Raises:
        KeyError: something is not there.
        TypeError: something is of another kind.
        AttributeError: likewise.
        ValueError: a value that no export states, in a few words.
    """
    stated, outputs = found["exported"], found["check"]["outputs"]
    target = Target(*(stated[key] for key in Target._fields))
    _want(target.form in FORMS, f"form = {target.form!r}")
    _want(isinstance(target.model, str), f"model = {target.model!r}")
    _want(type(target.image_size) is int and target.image_size > 0, f"image_size = {target.image_size!r}")
    _want(isinstance(target.arguments, dict), f"arguments = {target.arguments!r}")
    _want(target.norm_eps is None or _finite(target.norm_eps), f"norm_eps = {target.norm_eps!r}")
    ratio = target.arguments.get("mask_ratio", 0.5)
    _want(_finite(ratio) and 0 <= ratio < 1, f"mask_ratio = {ratio!r}")
    named = isinstance(target.outputs, list) and target.outputs and set(target.outputs) <= set(OUTPUTS)
    _want(bool(named) and set(target.outputs) == outputs.keys(), f"outputs = {target.outputs!r}")
    needed = {CONFIG, WEIGHTS} if target.form == "huggingface" else set()
    _want(bool(stated["files"].keys()) and needed <= stated["files"].keys(), f"files = {list(stated['files'])}")
    for name, file in stated["files"].items():
        _want(is_plain(name), f"file {name!r}")
        _want(type(file["bytes"]) is int and len(bytes.fromhex(file["sha256"])) == 32, f"size or sha256 of {name}")
    for name, kept in outputs.items():
        _check_output(name, kept["shape"], kept["largest"], kept["sample"])


def _check_output(name: str, shape: Any, largest: Any, sample: Any) -> None:
    _want(isinstance(shape, list) and all(type(side) is int and side > 0 for side in shape), f"shape of {name}")
    _want(_finite(largest), f"largest of {name} = {largest!r}")
    _want(isinstance(sample, list) and all(map(_finite, sample)), f"sample of {name}")
    expected = min(SAMPLES, math.prod(shape))
    _want(len(sample) == expected, f"sample of {name}: {len(sample)} values instead of {expected}")


def is_plain(name: str) -> bool:
    """Whether it names a file of the folder itself."""
    return name == Path(name).name and name not in ("", "..")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _want(fits: bool, otherwise: str) -> None:
    if not fits:
        raise ValueError(otherwise)
