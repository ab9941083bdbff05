"""Encoders in folders of transformers: the config and tensors of a ViTMAE, ViT, BEiT or Swin, of any of their heads."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ummim.backbones.relative_vit import RelativeViT, RelativeViTConfig
from ummim.backbones.table_swin import TOKEN, UNIT, TableSwinConfig
from ummim.backbones.vit import ViTConfig
from ummim.checkpoint_file import listed, read_checkpoint_file
from ummim.errors import UserError
from ummim.interop.foreign import Foreign, fill_in, foreign_encoder
from ummim.interop.huggingface import CONFIG, WEIGHTS
from ummim.interop.huggingface_names import (
    BEIT,
    SWIN,
    VIT,
    Kind,
    Theirs,
    encoder_names,
    from_theirs,
    mae_names,
    prefixed,
    simmim_names,
)
from ummim.interop.sizes import fitting
from ummim.methods import mae
from ummim.nn.aggregation import PartialConfig
from ummim.nn.decoder import DecoderConfig

KINDS = {"vit_mae": VIT, "vit": VIT, "beit": BEIT, "swin": SWIN}
PREFIXES = {"vit_mae": "vit.", "vit": "vit.", "beit": "beit.", "swin": "swin."}
PICKLED = "pytorch_model.bin"
# What a config means that does not say it.
VIT_DEFAULTS = {
    "image_size": 224, "patch_size": 16, "num_channels": 3, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    "qkv_bias": True,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": VIT_DEFAULTS,
    "vit_mae": {
        **VIT_DEFAULTS, "decoder_hidden_size": 512, "decoder_num_hidden_layers": 8, "decoder_num_attention_heads": 16,
        "decoder_intermediate_size": 2048, "norm_pix_loss": False,
    },
    "beit": {
        **VIT_DEFAULTS, "use_absolute_position_embeddings": False, "use_relative_position_bias": False,
        "use_shared_relative_position_bias": False,
    },
    "swin": {
        "image_size": 224, "patch_size": 4, "num_channels": 3, "embed_dim": 96, "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24], "window_size": 7, "mlp_ratio": 4.0, "qkv_bias": True, "hidden_act": "gelu",
        "use_absolute_embeddings": False, "layer_norm_eps": 1e-5,
    },
}  # fmt: skip


def weights_file(folder: Path) -> Path:
    """The file of a folder's tensors.

    Raises:
        UserError: there is none, or there are several.
    """
    for name in (WEIGHTS, PICKLED):
        if (folder / name).is_file():
            return folder / name
        if (folder / f"{name}.index.json").is_file():
            raise UserError(f"{folder}: its tensors are in several files: save it with max_shard_size='100GB', as one")
    raise UserError(f"{folder}: has a {CONFIG}, but neither {WEIGHTS} nor {PICKLED}")


def from_huggingface(folder: Path) -> Foreign:
    """The encoder of a folder that ``save_pretrained`` or ``ummim export`` wrote, and an MAE's or SimMIM's decoder.

    Norms get the config's eps, a Swin's all of them (transformers' fixes 1e-5 in four).

    Raises:
        UserError: another model, one that ours cannot compute, or tensors that do not fit the config.
    """
    config = _config(folder)
    kind = str(config["model_type"])
    held = _tensors(folder, kind)
    prefix = PREFIXES[kind] if any(key.startswith(PREFIXES[kind]) for key in held) else ""
    what = f"transformers' {(config.get('architectures') or [kind])[0]}"
    sizes, image_size = _sizes(config, prefix, held, folder)
    names = Names(kind, prefix, held)
    encoder = foreign_encoder(sizes, image_size, names.has, float(config["layer_norm_eps"]), str(folder))
    known = names.of(encoder.state_dict(), config)
    joined, left = from_theirs(held, known)
    _without_bias(joined, encoder, config)
    _without_factors(joined, encoder)
    inside = (f"{prefix}encoder.", f"{prefix}embeddings.")
    if strange := [key for key in left if key.startswith(inside) and not key.endswith("mask_token")]:
        raise UserError(f"{folder}: {what} has tensors that our {type(encoder).__name__} has no place for: "
                        f"{listed(strange, 4)}")  # fmt: skip
    fill_in(encoder, joined, str(folder))
    rest: dict[str, Tensor] = {}
    if kind == "vit_mae" and "decoder.mask_token" in held:
        rest, left = from_theirs({key: held[key] for key in left}, _decoder_names(config, sizes, image_size, folder))
    elif kind == "swin" and "decoder.0.weight" in held:
        flat = {**held, "decoder.0.weight": held["decoder.0.weight"].flatten(1)}  # a 1x1 convolution
        rest, left = from_theirs({key: flat[key] for key in left}, simmim_names())
    return Foreign(what, encoder, {key: tensor.float() for key, tensor in rest.items()}, left)


class Names:
    """Their names of our tensors.

    Args:
        kind: model_type of the config.
        prefix: of the encoder, in a model with a head.
        held: the file's tensors.
    """

    def __init__(self, kind: str, prefix: str, held: Mapping[str, Tensor]) -> None:
        self.kind: Kind = KINDS[kind]
        self.prefix, self.held = prefix, held

    def has(self, key: str) -> bool:
        """Whether the file has our tensor ``key``."""
        return any(part in self.held for part in self.parts([key])[key])

    def parts(self, keys: Iterable[str]) -> dict[str, Theirs]:
        return prefixed(self.prefix, encoder_names(keys, self.kind))

    def of(self, keys: Iterable[str], config: Mapping[str, Any]) -> dict[str, Theirs]:
        """{our key: names of its parts}, of those that a model of this config has."""
        biased = config["qkv_bias"]
        return self.parts(key for key in keys if biased or not key.endswith("attn.qkv.bias"))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        told = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: is no JSON: {error}") from None
    kind = told.get("model_type") if isinstance(told, dict) else None
    if kind not in KINDS:
        raise UserError(f"{path}: model_type = {kind!r}: can be read are {', '.join(KINDS)}")
    config = {**DEFAULTS[kind], **told}
    for key, only in (("num_channels", 3), ("hidden_act", "gelu"), ("use_absolute_embeddings", False)):
        if config.get(key, only) != only:
            raise UserError(f"{path}: {key} = {config[key]!r}: only {only!r} is supported")
    for key in ("image_size", "patch_size"):
        sides = config[key] if isinstance(config[key], list) else [config[key]]
        if len(set(sides)) != 1:
            raise UserError(f"{path}: {key} = {config[key]!r}: only squares are supported")
        config[key] = sides[0]
    return config


def _tensors(folder: Path, kind: str) -> dict[str, Tensor]:
    path = weights_file(folder)
    try:
        held: Mapping[str, Any] = load_file(path) if path.name == WEIGHTS else read_checkpoint_file(str(path))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    # As transformers 5 saves an MAE's decoder; the hub's files have the other name.
    renamed = {key.replace("decoder_encoder.layer.", "decoder_layers."): tensor for key, tensor in held.items()}
    return {key: tensor for key, tensor in renamed.items() if not key.endswith("relative_position_index")}


def _sizes(
    config: Mapping[str, Any], prefix: str, held: Mapping[str, Tensor], folder: Path
) -> tuple[ViTConfig | RelativeViTConfig | TableSwinConfig, int]:
    """Our config of the encoder, and the side of its images in pixels."""
    if config["model_type"] == "swin":
        return _swin(config, folder), config["image_size"]
    width = config["hidden_size"]
    common = {
        "patch_size": config["patch_size"],
        "embed_dim": width,
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / width,
    }
    own = bool(config.get("use_relative_position_bias", False))
    shared = bool(config.get("use_shared_relative_position_bias", False))
    if own and shared:
        raise UserError(f"{folder / CONFIG}: relative positions of each block and shared ones: only one is supported")
    absolute = bool(config.get("use_absolute_position_embeddings", True))
    scaled = f"{prefix}encoder.layer.0.lambda_1" in held
    if config["model_type"] == "beit" and (own or shared or scaled or not absolute):
        relative = own or shared
        return RelativeViTConfig(
            **common, drop_path=0.0, relative_position=relative, absolute_position=absolute
        ), config["image_size"]  # fmt: skip
    return ViTConfig(**common), config["image_size"]


def _swin(config: Mapping[str, Any], folder: Path) -> TableSwinConfig:
    if config["patch_size"] != TOKEN or len(config["depths"]) != 4:
        raise UserError(f"{folder / CONFIG}: supported are Swins of four stages on patches of {TOKEN} pixels")
    if config["window_size"] > config["image_size"] // UNIT:
        raise UserError(f"{folder / CONFIG}: window_size = {config['window_size']}: is wider than the last stage's map")
    depths, heads = tuple(config["depths"]), tuple(config["num_heads"])
    return TableSwinConfig(
        embed_dim=config["embed_dim"],
        depths=depths,
        num_heads=heads,
        window_size=config["window_size"],
        mlp_ratio=config["mlp_ratio"],
    )


def _without_bias(joined: dict[str, Tensor], encoder: nn.Module, config: Mapping[str, Any]) -> None:
    """Zeros, where queries, keys and values have no bias."""
    if not config["qkv_bias"]:
        shapes = {key: value for key, value in encoder.state_dict().items() if key.endswith("attn.qkv.bias")}
        joined |= {key: torch.zeros(value.shape) for key, value in shapes.items()}


def _without_factors(joined: dict[str, Tensor], encoder: nn.Module) -> None:
    """Factors of 1, where a BEiT's branches have none."""
    if isinstance(encoder, RelativeViT) and "blocks.0.gamma_1" not in joined:
        shapes = {key: value for key, value in encoder.state_dict().items() if ".gamma_" in key}
        joined |= {key: torch.ones(value.shape) for key, value in shapes.items()}


def _decoder_names(config: Mapping[str, Any], sizes: Any, image_size: int, folder: Path) -> dict[str, Theirs]:
    """The names of an MAE's decoder."""
    width = config["decoder_hidden_size"]
    decoder = DecoderConfig(
        embed_dim=width,
        depth=config["decoder_num_hidden_layers"],
        num_heads=config["decoder_num_attention_heads"],
        mlp_ratio=config["decoder_intermediate_size"] / width,
    )
    asked = mae.Config(encoder=sizes, decoder=decoder, norm_pix_loss=bool(config["norm_pix_loss"]))
    try:
        fitting(asked.check_sizes(image_size))
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    with torch.device("meta"):
        method = mae.MAE(image_size, asked, PartialConfig(), False)
    names: dict[str, Theirs] = {}
    for key in method.state_dict():
        if not key.startswith("encoder."):
            with suppress(KeyError):
                names |= mae_names([key])
    return names
