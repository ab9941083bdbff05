"""Weights, images, noise and masks by formula, for which the official code's results are known (docs/fidelity.md)."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ummim.nn.layers import sincos_table

KEYS: dict[str, dict[str, list[int]]] = json.loads(Path(__file__).with_name("official_keys.json").read_text())
PR_KEYS = {"pr_dwconv.weight": [512, 1, 7, 7], "pr_dwconv.bias": [512]}


def fraction(x: Tensor) -> Tensor:
    return x - x.floor()


def weight(name: str, shape: Sequence[int]) -> Tensor:
    """The float64 tensor of an official key; position tables are the fixed ones."""
    if name.endswith("pos_embed"):
        side = math.isqrt(shape[1])
        return sincos_table(shape[2], (side, side), cls_token=side * side != shape[1]).double()
    size = math.prod(shape)
    phase = (sum(name.encode()) % 1000) / 100
    index = torch.arange(1, size + 1, dtype=torch.float64)
    u = 2 * fraction(torch.sin(index * 12.9898 + phase) * 43758.5453) - 1
    if "norm" in name and name.endswith(".weight"):
        u = 1 + 0.1 * u
    elif len(shape) >= 2 and shape[0] > 1:
        u = (3 / (size / shape[0])) ** 0.5 * u
    else:
        u = 0.1 * u
    return u.view(*shape)


def weights(keys: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    return {name: weight(name, shape) for name, shape in keys.items()}


def images(side: int) -> Tensor:
    """(2, 3, side, side) float64."""
    at = torch.arange(1, side + 1, dtype=torch.float64)
    h, w = at[:, None], at
    c = torch.arange(1, 4, dtype=torch.float64)[:, None, None]
    b = torch.arange(2, dtype=torch.float64)[:, None, None, None]
    return torch.sin(0.013 * h * c + 0.017 * w + 0.5 * b) + 0.3 * torch.cos(0.11 * h - 0.07 * w * c)


def noise(tokens: int) -> Tensor:
    """(2, tokens) float64 in place of uniform draws."""
    at = torch.arange(1, tokens + 1, dtype=torch.float64) * 0.6180339887498949
    return fraction(at + 0.37 * torch.arange(2, dtype=torch.float64)[:, None])


def random_mask() -> Tensor:
    """(2, 196) bool, 49 visible."""
    masked = torch.ones(2, 196, dtype=torch.bool)
    return masked.scatter(1, noise(196).argsort(1)[:, :49], False)


def uniform_mask() -> tuple[Tensor, Tensor]:
    """(2, 256) bool masked, and secondary: all but 48 of the 64 visible."""
    masked = torch.ones(2, 16, 16, dtype=torch.bool)
    for b in range(2):
        for i in range(8):
            for j in range(8):
                cell = (3 * i + 5 * j + b + i * j) % 4
                masked[b, 2 * i + cell // 2, 2 * j + cell % 2] = False
    masked = masked.flatten(1)
    stay = (noise(256) + masked.double()).argsort(1)[:, :48]
    return masked, (~masked).scatter(1, stay, False)
