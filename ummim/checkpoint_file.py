"""Read a checkpoint that other code wrote, without running any code that it holds, and say how it misfits a model."""

import argparse
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

# What official training code stores beside tensors and plain values: arguments, and SimMIM's configuration, which is a
# dict and is read as one.
STORED: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]


def read_checkpoint_file(path: str) -> Mapping[str, Any]:
    """What a file holds, a dict, on the CPU: safetensors by its suffix, else ``torch.save`` with ``weights_only``.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no checkpoint, or holds objects that only code could make; the message, without the path, says
            which.
    """
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        with torch.serialization.safe_globals(STORED):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler lets junk raise anything: KeyError, struct.error, IndexError, ...
        foreign = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        reason = (str(error) or type(error).__name__).splitlines()[0]
        reason = f"it holds a {foreign[1]}; only tensors and plain values are unpickled" if foreign else reason
        raise ValueError(f"cannot be read as a checkpoint: {reason}") from error
    if not isinstance(held, Mapping):
        raise ValueError(f"holds a {type(held).__name__}, not a state dict")
    return held


def key_faults(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], most: int = 20) -> str:
    """Which keys are missing, left over or of another shape, at most ``most`` of each; empty: the tensors fit."""
    problems = {
        "missing keys": [key for key in shapes if key not in tensors],
        "left-over keys": [key for key in tensors if key not in shapes],
        "mis-shaped keys": [
            f"{key} {tuple(tensors[key].shape)} instead of {tuple(shape)}"
            for key, shape in shapes.items()
            if key in tensors and tensors[key].shape != shape
        ],
    }
    return "; ".join(f"{what}: {listed(keys, most)}" for what, keys in problems.items() if keys)


def listed(names: Sequence[str], most: int = 20) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
