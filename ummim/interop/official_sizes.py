"""The sizes of a model that an official checkpoint of it does not tell: keywords of ``load_official``."""

from typing import Any

from ummim.interop.official import FAMILIES
from ummim.methods.api import Method


def official_sizes(method: Method, family: str) -> dict[str, Any]:
    """{keyword: value}, plain values only, of a model of the family or of the recipe that is to take its weights."""
    encoder: Any = method.encoder
    config = encoder.config
    sizes = {
        "img_size": method.grid[0] * method.patch_size,
        "num_heads": config.num_heads,
        "window_size": getattr(config, "window_size", None),
        "sr_ratios": getattr(config, "sr_ratios", None),
        "decoder_num_heads": _decoder_heads(method),
        "norm_pix_loss": method.norm_pix_loss,
        "taps": getattr(method, "taps", None),
        **_local_target(method),
    }
    if any(getattr(getattr(layer, "downsample", None), "row_major", False) for layer in getattr(encoder, "layers", ())):
        sizes["row_major_merge"] = True
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in sizes.items()
        if value is not None and name in FAMILIES[family].sizes
    }


def _decoder_heads(method: Any) -> int | None:
    if hasattr(method, "decoders"):  # LocalMIM's four
        return method.decoders[0].decoder.blocks[0].attn.num_heads
    blocks = getattr(getattr(method, "decoder", None), "blocks", None)
    return blocks[0].attn.num_heads if blocks else None


def _local_target(method: Any) -> dict[str, Any]:
    """LocalMIM's target; its number of orientations is read off the tensors."""
    config = getattr(method, "config", None)
    return {"target": config.target} if config is not None and hasattr(config, "target") else {}
