"""Encoders as timm models: safetensors that ``timm.create_model`` loads with ``strict=True``."""

import json
import os
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ummim.backbones.vit import ViT, ViTConfig
from ummim.errors import UserError

# timm's plain ViTs by (patch_size, embed_dim, depth, num_heads); all have mlp_ratio 4 and LayerNorm eps 1e-6.
TIMM_VITS = {
    (16, 192, 12, 3): "vit_tiny_patch16_224",
    (32, 384, 12, 6): "vit_small_patch32_224",
    (16, 384, 12, 6): "vit_small_patch16_224",
    (8, 384, 12, 6): "vit_small_patch8_224",
    (32, 768, 12, 12): "vit_base_patch32_224",
    (16, 768, 12, 12): "vit_base_patch16_224",
    (8, 768, 12, 12): "vit_base_patch8_224",
    (32, 1024, 24, 16): "vit_large_patch32_224",
    (16, 1024, 24, 16): "vit_large_patch16_224",
    (14, 1024, 24, 16): "vit_large_patch14_224",
    (14, 1280, 32, 16): "vit_huge_patch14_224",
}


def export_timm(model: nn.Module) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """An encoder's tensors as timm names them, and the timm model that takes them.

    Args:
        model: a ViT encoder, or a method, of which the encoder is taken.

    Returns:
        (tensors, name, kwargs): ``timm.create_model(name, **kwargs)`` loads the tensors with ``strict=True``,
        and its ``forward_features`` equals the encoder's output on whole images. Like ``state_dict``, the
        tensors share memory with the model.

    Raises:
        UserError: an encoder that timm has no counterpart of.
    """
    encoder = model if isinstance(model, ViT) else getattr(model, "encoder", model)
    if not isinstance(encoder, ViT):
        raise UserError(
            f"timm has no model like this {type(encoder).__name__} (position MLPs, convolutional merges), so "
            "it cannot be exported as timm; use --format official or --format safetensors"
        )
    name, kwargs = _architecture(encoder.config, encoder.grid)
    return encoder.state_dict(), name, kwargs


def write_timm(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write :func:`export_timm`'s tensors as safetensors.

    The metadata hold ``architecture`` (timm's model name) and ``kwargs`` (JSON) for ``timm.create_model``.

    Raises:
        UserError: an encoder that timm has no counterpart of.
        OSError: the file cannot be written.
    """
    tensors, name, kwargs = export_timm(model)
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt", "architecture": name, "kwargs": json.dumps(kwargs)})


def _architecture(config: ViTConfig, grid: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """timm's model name and what differs from that model's own sizes."""
    size = (config.patch_size, config.embed_dim, config.depth, config.num_heads)
    kwargs: dict[str, Any] = {"num_classes": 0, "global_pool": "token"}  # keeps the final norm, and no head
    image_size = grid[0] * config.patch_size
    if image_size != 224:
        kwargs["img_size"] = image_size
    if config.mlp_ratio != 4:
        kwargs["mlp_ratio"] = config.mlp_ratio
    if size not in TIMM_VITS:
        names = ("patch_size", "embed_dim", "depth", "num_heads")
        kwargs.update(zip(names, size, strict=True))
    return TIMM_VITS.get(size, "vit_base_patch16_224"), kwargs
