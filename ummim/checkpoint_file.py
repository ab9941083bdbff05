"""Read a checkpoint that other code wrote, without running any code that it holds."""

import argparse
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file

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
