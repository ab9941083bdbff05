"""Models as folders that transformers' ``from_pretrained`` loads: which class holds a model, its config and tensors.

An encoder becomes a ``ViTModel``, ``BeitModel`` (SimMIM's ViT, with its position table) or ``SwinModel``; with its
decoder, MAE becomes a ``ViTMAEForPreTraining`` and SimMIM on Swin a ``SwinForMaskedImageModeling``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ummim.atomic import write_text
from ummim.backbones.relative_vit import RelativeViT
from ummim.backbones.sparse_swin import SparseSwin
from ummim.backbones.table_swin import TOKEN, UNIT, TableSwin
from ummim.backbones.vit import ViT
from ummim.data.normalise import IMAGENET_MEAN, IMAGENET_STD
from ummim.errors import UserError
from ummim.interop.huggingface_names import (
    BEIT,
    SWIN,
    VIT,
    encoder_names,
    mae_names,
    prefixed,
    simmim_names,
    swin_indices,
    to_theirs,
)
from ummim.interop.timm import TOKENS, merge_by_columns
from ummim.methods.api import Method
from ummim.methods.mae import MAE
from ummim.methods.simmim import SimMIM
from ummim.nn.aggregation import SpatialAggregation
from ummim.nn.layers import eps_of

BICUBIC = 3  # Pillow's number
CONFIG, PREPROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
SWIN_EPS = 1e-5
FRESH_NORM = (
    "the pre-trained encoder has no final norm and the class has one: its layernorm is fresh (weight 1, bias 0)"
)
FIXED_EPS = (
    "the encoder's norms have eps 1e-6; transformers' Swin fixes 1e-5 in the norms of its patch embedding and merges: "
    "set those four to 1e-6 after loading, as the README shows, for features equal to 1e-5"
)


@dataclass(frozen=True)
class HuggingFaceModel:
    """What a folder holds.

    Attributes:
        architecture: the class of transformers.
        config: of ``config.json``.
        tensors: under the hub's names.
        arguments: what ``from_pretrained`` needs beside the folder.
        norm_eps: what every norm's eps is to be set to after loading; None: the config says it all.
        notes: what differs from our model, or stays behind.
    """

    architecture: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    arguments: dict[str, Any]
    norm_eps: float | None = None
    notes: tuple[str, ...] = ()


def to_huggingface(method: Method, mask_ratio: float, encoder_only: bool = False) -> HuggingFaceModel:
    """A method as a model of transformers: whole where a class has its decoder, else its encoder.

    Args:
        method: any method.
        mask_ratio: the share of patches that a plan hides, of which MAE's class draws its masks.
        encoder_only: the encoder, even where the whole would go.

    Raises:
        UserError: an encoder that transformers does not have.
    """
    if encoder_only:
        return encoder_to_huggingface(method.backbone())
    if isinstance(method, MAE) and _passes_kept(method):
        return _mae(method, mask_ratio)
    if isinstance(method, SimMIM) and isinstance(method.encoder, TableSwin) and not method.norm_pix_loss:
        return _simmim_swin(method, method.encoder)
    return encoder_to_huggingface(method.backbone())


def encoder_to_huggingface(encoder: nn.Module) -> HuggingFaceModel:
    """An encoder as a ``ViTModel``, ``BeitModel`` or ``SwinModel``.

    Raises:
        UserError: an encoder that transformers does not have, or not with these sizes.
    """
    if isinstance(encoder, ViT):
        tensors = to_theirs(own_tensors(encoder), encoder_names(own_tensors(encoder), VIT))
        config = {"model_type": "vit", **vit_config(encoder), "qkv_bias": True}
        tensors, notes = _with_norm(encoder, tensors)
        return model_of("ViTModel", config, tensors, {"add_pooling_layer": False}, notes=notes)
    if isinstance(encoder, RelativeViT):
        names = encoder_names(own_tensors(encoder), BEIT)
        return model_of(
            "BeitModel", beit_config(encoder), to_theirs(own_tensors(encoder), names), {"add_pooling_layer": False}
        )
    if isinstance(encoder, (TableSwin, SparseSwin)):
        ordered = merge_by_columns(encoder, own_tensors(encoder))
        tensors, notes = _with_norm(encoder, to_theirs(ordered, encoder_names(ordered, SWIN)))
        eps, differs = fixed_eps(encoder)
        return model_of("SwinModel", swin_config(encoder), tensors, {}, eps, (*notes, *differs))
    raise UserError(
        f"transformers has no model like this {type(encoder).__name__} (position MLPs, convolutional merges or pooled "
        "keys); use --format official for the paper's own code, or --format safetensors"
    )


def own_tensors(encoder: nn.Module) -> dict[str, Tensor]:
    """An encoder's tensors without the tokens of pre-training."""
    return {key: tensor for key, tensor in encoder.state_dict().items() if key not in TOKENS}


def write_folder(model: HuggingFaceModel, image_size: int, folder: Path) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors into ``folder``, which exists.

    The preprocessor resizes to a square, which is all that transformers' one for ViT and Swin does.

    Raises:
        OSError: a file cannot be written.
    """
    config = {"architectures": [model.architecture], **model.config, "torch_dtype": "float32"}
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    write_text(folder / PREPROCESSOR, json.dumps(processor, indent=2) + "\n")
    save_file(model.tensors, folder / WEIGHTS, {"format": "pt"})


def vit_config(encoder: ViT | RelativeViT) -> dict[str, Any]:
    """What the configs of all ViTs share."""
    config = encoder.config
    return {
        "image_size": encoder.grid[0] * config.patch_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": int(config.embed_dim * config.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": eps_of(encoder),
    }


def beit_config(encoder: RelativeViT) -> dict[str, Any]:
    """SimMIM's ViT: one table of relative positions for all blocks or, fine-tuned, one for each; a norm, no pooling."""
    config = encoder.config
    return {
        "model_type": "beit",
        **vit_config(encoder),
        "use_absolute_position_embeddings": config.absolute_position,
        "use_relative_position_bias": config.relative_position and encoder.rel_pos_bias is None,
        "use_shared_relative_position_bias": encoder.rel_pos_bias is not None,
        "layer_scale_init_value": config.layer_scale or 0.1,  # 0 would mean no factors at all
        "drop_path_rate": config.drop_path,
        "use_mean_pooling": False,
        "use_mask_token": False,
    }


def swin_config(encoder: TableSwin | SparseSwin) -> dict[str, Any]:
    """A Swin's config.

    Raises:
        UserError: a stage whose map is smaller than the window, or tokens at other places than a Swin's.
    """
    config, last = encoder.config, encoder.grid[0]
    if config.window_size > last:
        raise UserError(
            f"transformers' Swin has tables of one size in all stages, and here the last stage's map of {last}x{last} "
            f"tokens is smaller than the window of {config.window_size}; use --format timm"
        )
    if getattr(encoder, "legacy_coordinates", False):
        raise UserError(
            "method.legacy_coordinates = true places tokens where no Swin of transformers does; use --format official"
        )
    return {
        "model_type": "swin",
        "image_size": encoder.grid[0] * UNIT,
        "patch_size": TOKEN,
        "num_channels": 3,
        "embed_dim": config.embed_dim,
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "window_size": config.window_size,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": config.drop_path,
        "use_absolute_embeddings": False,
        "layer_norm_eps": encoder.layers[0].blocks[0].norm1.eps,  # type: ignore[union-attr, index]
        "encoder_stride": UNIT,
    }


def _passes_kept(method: MAE) -> bool:
    """Whether a plan that throws nothing is predicted as without an aggregation."""
    aggregation = method.aggregation
    return not isinstance(aggregation, SpatialAggregation) or aggregation.config.fill == "thrown"


def _mae(method: MAE, mask_ratio: float) -> HuggingFaceModel:
    block: Any = method.decoder.blocks[0]
    state = {key: value for key, value in method.state_dict().items() if key.removeprefix("encoder.") not in TOKENS}
    width = method.embed.out_features
    config = {
        "model_type": "vit_mae",
        **vit_config(method.encoder),
        "qkv_bias": True,
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": len(method.decoder.blocks),
        "decoder_num_attention_heads": block.attn.num_heads,
        "decoder_intermediate_size": block.mlp.fc1.out_features,
        "mask_ratio": mask_ratio,
        "norm_pix_loss": method.norm_pix_loss,
    }
    notes: tuple[str, ...] = ()
    if isinstance(method.aggregation, SpatialAggregation):
        notes = ("PR-MIM's spatial aggregation has no place in the class and stays behind: it reconstructs in full",)
    return model_of("ViTMAEForPreTraining", config, to_theirs(state, mae_names(state)), {}, notes=notes)


def _simmim_swin(method: SimMIM, encoder: TableSwin) -> HuggingFaceModel:
    state = encoder.state_dict()  # with its mask token
    tensors = to_theirs(state, prefixed("swin.", encoder_names(state, SWIN)))
    head = to_theirs({f"head.{key}": value for key, value in method.head.state_dict().items()}, simmim_names())
    tensors |= {
        "decoder.0.weight": head["decoder.0.weight"][:, :, None, None],
        "decoder.0.bias": head["decoder.0.bias"],
    }
    note = f"its masks are of {TOKEN}-pixel tokens: repeat each {UNIT}-pixel unit {UNIT // TOKEN}x{UNIT // TOKEN} times"
    eps, differs = fixed_eps(encoder)
    return model_of("SwinForMaskedImageModeling", swin_config(encoder), tensors, {}, eps, (note, *differs))


def _with_norm(encoder: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """With a fresh final norm, and a note of it, where the encoder has none."""
    if not isinstance(encoder.norm, nn.Identity):
        return tensors, ()
    fresh = nn.LayerNorm(encoder.embed_dim)
    norm = {"layernorm.weight": fresh.weight.detach(), "layernorm.bias": fresh.bias.detach()}
    return {**tensors, **norm}, (FRESH_NORM,)


def fixed_eps(encoder: TableSwin | SparseSwin) -> tuple[float | None, tuple[str, ...]]:
    """What to set all norms' eps to after loading, and a note of it, where transformers' Swin fixes another."""
    eps = swin_config(encoder)["layer_norm_eps"]
    return (None, ()) if eps == SWIN_EPS else (eps, (FIXED_EPS,))


def model_of(
    architecture: str,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    arguments: dict[str, Any],
    norm_eps: float | None = None,
    notes: tuple[str, ...] = (),
) -> HuggingFaceModel:
    held = {key: tensor.detach().float().contiguous() for key, tensor in tensors.items()} | swin_indices(tensors)
    return HuggingFaceModel(architecture, config, held, arguments, norm_eps, notes)
