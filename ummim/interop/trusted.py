"""What of an export's own words reaches the library that loads it: no more than ``ummim export`` writes.

A certificate, a config and metadata may come from anyone, and libraries take keywords that make them unpickle files or
fetch code.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ummim.errors import UserError
from ummim.interop.huggingface import CONFIG, WEIGHTS
from ummim.interop.timm import TIMM_BEITS, TIMM_SWINS, TIMM_VITS

FROM_PRETRAINED = {"add_pooling_layer", "mask_ratio"}
CREATE_MODEL = {
    "num_classes",
    "global_pool",
    "img_size",
    "patch_size",
    "window_size",
    "embed_dim",
    "depth",
    "depths",
    "num_heads",
    "mlp_ratio",
    "final_norm",
    "use_rel_pos_bias",
    "use_shared_rel_pos_bias",
    "use_abs_pos_emb",
}
TIMM_MODELS = {*TIMM_VITS.values(), *TIMM_BEITS.values(), *TIMM_SWINS.values()}
FETCHES = ("implementation", "quantization", "auto_map", "transformers_weights", "adapter", "kernel")  # parts of keys


def from_pretrained_arguments(path: Path, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of ``from_pretrained``: the stated ones, and that no pickle is read.

    Raises:
        UserError: an argument that ``ummim export`` does not write.
    """
    _only(path, "argument", stated, FROM_PRETRAINED)
    arguments = {key: bool(value) for key, value in stated.items() if key != "mask_ratio"}
    return {**arguments, "use_safetensors": True, "weights_only": True, "local_files_only": True}


@contextmanager
def plain_folder(path: Path) -> Iterator[Path]:
    """A folder with links to config and weights of a folder of transformers, and nothing else that it may take.

    Raises:
        UserError: one of them is not there, or the config names code or weights elsewhere.
    """
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise UserError(f"{path / name}: no such file; nothing else is loaded: export again")
    try:
        config = json.loads((path / CONFIG).read_text())
    except ValueError as error:
        raise UserError(f"{path / CONFIG}: is no JSON ({error}): export again") from None
    for key, value in config.items() if isinstance(config, dict) else ():
        if any(part in key for part in FETCHES):
            raise UserError(f"{path / CONFIG}: {key} = {value!r} is none that ummim export writes: nothing was loaded")
    with TemporaryDirectory(prefix="ummim-") as folder:
        for name in (CONFIG, WEIGHTS):
            (Path(folder) / name).symlink_to((path / name).resolve())
        yield Path(folder)


def timm_model(path: Path, metadata: Mapping[str, str]) -> tuple[str, dict[str, Any], float]:
    """Name, keywords and the norms' eps of the timm model that a file's metadata name.

    Raises:
        UserError: a model or keyword that ``ummim export`` does not write, or none.
    """
    try:
        name, kwargs, eps = metadata["architecture"], dict(json.loads(metadata["kwargs"])), float(metadata["norm_eps"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: its metadata name no timm model: it was not written by ummim export") from None
    if name not in TIMM_MODELS:
        raise UserError(f"{path}: architecture {name!r} is none that ummim export writes: nothing was loaded")
    _only(path, "keyword", kwargs, CREATE_MODEL)
    return name, kwargs, eps


def _only(path: Path, what: str, found: Mapping[str, Any], known: Iterable[str]) -> None:
    for key, value in found.items():
        if key not in known:
            raise UserError(
                f"{path}: {what} {key} = {value!r} is none that ummim export writes ({', '.join(sorted(known))}): "
                "nothing was loaded; do not trust this export"
            )
