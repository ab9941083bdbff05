"""``ummim export``: a trained method to a file that other programs read."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ummim.errors import UserError
from ummim.interop.official import family_of, save_official
from ummim.interop.timm import write_timm
from ummim.methods.api import Method
from ummim.recipe import Recipe
from ummim.recipe_file import to_dict


def export(recipe: Recipe, method: Method, out: Path, form: str) -> Path:
    """Write ``method`` to ``out`` as ``form`` (safetensors, timm or official), atomically.

    Raises:
        UserError: a format that does not exist for this method, or a folder where the file should go.
    """
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name the file to write")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        if form == "timm":
            write_timm(method.backbone(), partial)
        elif form == "official":
            torch.save({"model": save_official(method, _family(method))}, partial)
        else:
            tensors = {key: tensor.contiguous() for key, tensor in method.backbone().state_dict().items()}
            save_file(tensors, partial, {"format": "pt", "ummim_recipe": json.dumps(to_dict(recipe))})
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def _family(method: Method) -> str:
    family = family_of(method)
    if family is None:
        raise UserError(f"{type(method).__name__} has no official format; use --format safetensors")
    return family
