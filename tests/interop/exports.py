"""Tiny recipes and models to export, with weights that are far from their initial values."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.methods.tiny import METHODS
from ummim.data.config import DataConfig
from ummim.methods.api import Method
from ummim.nn.aggregation import PartialConfig
from ummim.recipe import Recipe

CHECKPOINT = Path("run/checkpoints/step-3")  # need not be there


def shaken(model: Any, seed: int = 0) -> Any:
    """Away from zero biases and unit norms."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def tiny(name: str, throw: float = 0.0, fill: Any = "thrown", **method: Any) -> tuple[Recipe, Method]:
    """A recipe and its model; ``method``: options that differ from the tiny one's."""
    small = METHODS[name]
    recipe = Recipe(
        method=replace(small.config, **method),
        data=DataConfig(shards="nowhere", image_size=small.image_size),
        mask=small.mask,
        throw_ratio=throw,
        partial=PartialConfig(kernel_size=3, fill=fill),
        name=name,
        description="a tiny model",
    )
    return recipe, shaken(build(recipe))


def build(recipe: Recipe) -> Method:
    """A fresh model of the recipe."""
    return recipe.method.build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)


def images_of(recipe: Recipe) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, recipe.data.image_size, recipe.data.image_size)
