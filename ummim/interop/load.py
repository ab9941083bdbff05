"""Weights to start from: any format of ours or of others into a method, for continued pre-training.

Tensors are brought under our method's names, in the order of its merges, and copied where they fit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ummim.checkpoint_file import listed
from ummim.errors import UserError
from ummim.interop.official import FAMILIES
from ummim.interop.official_sizes import official_sizes
from ummim.interop.source import Source, read_source
from ummim.interop.timm import merges_by_rows, turn_merges
from ummim.methods.api import Method

CLASS_TOKEN = "encoder.cls_token"
BLOCKS = ("encoder.blocks.", "encoder.layers.", "encoder.stages.")


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


def load_init(method: Method, path: str | Path, family: str | None = None) -> Report:
    """Copy the weights of ``path`` into ``method``, encoder and, where they are there, all else that fits by name.

    Args:
        method: the method, on any device; a frozen teacher is left alone.
        path: whatever :func:`ummim.interop.source.read_source` reads.
        family: of an official file.

    Raises:
        UserError: nothing there, an unknown format, no weight of the encoder in it, or tensors of another shape.
        OSError: a file that cannot be opened.
    """
    sizes = official_sizes(method, family) if family in FAMILIES else {}
    source = read_source(Path(path), family, sizes, whole=True)
    tensors, left = _tensors(method, source), list(source.left)
    if _passes_mlp(method.state_dict()) and not _passes_mlp(tensors):  # a plain class token is no input of TEC's MLP
        left += [key for key in (CLASS_TOKEN,) if tensors.pop(key, None) is not None]
    own = {key: value for key, value in method.state_dict().items() if not _is_frozen(method, key)}
    used = [key for key in own if key in tensors]
    if not any(key.startswith(BLOCKS) for key in used):
        raise UserError(
            f"{path}: {source.what} has no block of this recipe's {type(method.encoder).__name__}; "
            f"found: {listed(list(tensors), 3)}"
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
    left += [key for key in tensors if key not in own]
    missing = tuple(key for key in own if key not in tensors)
    return Report(f"{source.what} {path}", tuple(used), missing, tuple(left))


def _tensors(method: Method, source: Source) -> dict[str, Tensor]:
    """The source's tensors under a method's names, its merges in the order of this method's."""
    encoder: Mapping[str, Tensor] = source.encoder.state_dict()
    if merges_by_rows(source.encoder) != merges_by_rows(method.encoder):
        encoder = turn_merges(encoder)
    return {**{f"encoder.{key}": tensor for key, tensor in encoder.items()}, **source.rest}


def _passes_mlp(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the class token passes an MLP before it joins the patches (TEC's)."""
    return any(key.startswith("encoder.cls_token_mlp.") for key in tensors)


def _is_frozen(method: Method, key: str) -> bool:
    frozen = method.frozen()
    return frozen is not None and any(child is frozen and key.startswith(f"{name}.") for name, child in
                                      method.named_children())  # fmt: skip
