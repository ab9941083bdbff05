"""Official fine-tuned models: an encoder for whole images, pooled, and a head."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ummim.backbones import relative_vit
from ummim.backbones.pyramid import TOKEN
from ummim.backbones.relative_vit import RelativeViTConfig
from ummim.downstream.adapt import Encoder, new_encoder
from ummim.downstream.classify import Classifier
from ummim.interop.families import mae, mff, simmim, um_mae
from ummim.interop.families.table_swin import INDEX, TABLE, stored_image_size, swin_config, swin_names
from ummim.interop.family import rename
from ummim.interop.sizes import Sizes, Tensors, agreed, fitting, heads_of, one, root, shape_of, table_side
from ummim.methods.um_mae import Config, check_pyramid

FINE_TUNED_SIZE = 256  # pixels, of UM-MAE's pyramids
HEAD = (("fc_norm.", "fc_norm."), ("head.", "head."))
VIT_SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
SWIN_SIZES = (*VIT_SIZES, "window_size")
CPU = torch.device("cpu")


def _none(model: Any) -> dict[str, Tensor]:
    return {}


class ClassifierFamily(NamedTuple):
    """One kind of official fine-tuned model.

    Attributes:
        build: our classifier, from the checkpoint's tensors, the number of classes and the sizes given. Raises
            OfficialError where they do not fit each other.
        sizes: keywords of ``load_official_classifier``.
        names: model -> {official key: our key of its state dict}.
        constants: official keys of fixed tensors that we compute instead of storing.
        head: prefixes of the official keys behind the encoder: the last norm, the head.
        classes: official key of the head's weight, (classes, D).
    """

    build: Callable[[Tensors, int, Sizes], Classifier]
    sizes: tuple[str, ...]
    names: Callable[[Any], dict[str, str]]
    constants: Callable[[Any], dict[str, Tensor]] = _none
    head: tuple[str, ...] = ("fc_norm.", "head.")
    classes: str = "head.weight"


def _on(encoder: Callable[[Tensors, Sizes], Encoder]) -> Callable[[Tensors, int, Sizes], Classifier]:
    """The mean of the patch tokens, a norm, a head; in Microsoft's Swin, its norm, the mean, a head."""
    return lambda tensors, classes, sizes: Classifier(encoder(tensors, sizes), classes)


def _vit(tensors: Tensors, sizes: Sizes) -> Encoder:
    config = mae.vit_config(tensors, sizes)
    image_size = mae.vit_image_size(tensors, sizes, config.patch_size)
    fitting(Config(config).check_sizes(image_size))
    return new_encoder(config, image_size)


def _um_swin(tensors: Tensors, sizes: Sizes) -> Encoder:
    image_size = one(sizes, "img_size", FINE_TUNED_SIZE)
    maps = [image_size // (TOKEN * 2**s) for s in range(4)]
    config = um_mae.swin_config(tensors, sizes, maps, default_window=16)
    fitting(check_pyramid(config, image_size, compact=False))
    return new_encoder(config, image_size)


def _um_pvt(tensors: Tensors, sizes: Sizes) -> Encoder:
    image_size = one(sizes, "img_size", (table_side(tensors, "pos_embed") or FINE_TUNED_SIZE // TOKEN) * TOKEN)
    config = um_mae.pvt_config(tensors, sizes, default_ratios=(8, 4, 2, 1))
    fitting(check_pyramid(config, image_size, compact=False))
    return new_encoder(config, image_size)


def _relative_vit(tensors: Tensors, sizes: Sizes) -> Encoder:
    """SimMIM's ViT, a table of relative positions in each block."""
    vit = mae.vit_config(tensors, sizes)
    tables = [f"blocks.{i}.attn.{TABLE}" for i in range(vit.depth)]
    config = RelativeViTConfig(
        patch_size=vit.patch_size,
        embed_dim=vit.embed_dim,
        depth=vit.depth,
        num_heads=one(sizes, "num_heads", heads_of(vit.embed_dim, [shape_of(tensors, key, 1) for key in tables])),
        mlp_ratio=vit.mlp_ratio,
        drop_path=0.0,
    )
    offsets = [root(rows - 3) if rows else None for rows in (shape_of(tensors, key, 0) for key in tables)]
    side = agreed(14, *((offset + 1) // 2 if offset else None for offset in offsets))
    image_size = one(sizes, "img_size", side * config.patch_size)
    fitting(simmim.Config(config).check_sizes(image_size))
    return new_encoder(config, image_size)


def _table_swin(tensors: Tensors, sizes: Sizes) -> Encoder:
    """Microsoft's Swin, with the sizes that SimMIM's fine-tuning gives it."""
    below = {f"encoder.{key}": tensor for key, tensor in tensors.items()}
    image_size = one(sizes, "img_size", stored_image_size(below))
    config = swin_config(below, sizes, image_size)
    fitting(simmim.Config(config).check_sizes(image_size))
    return new_encoder(config, image_size)


def _local_mim_swin(tensors: Tensors, classes: int, sizes: Sizes) -> Classifier:
    """LocalMIM's fine-tuned Swin: the norm stands behind the mean, and every norm has eps 1e-6 but those before the
    MLPs, which have PyTorch's 1e-5."""
    model = Classifier(_table_swin(tensors, sizes), classes, norm_last=True)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and not name.endswith(".norm2"):
            module.eps = 1e-6
    return model


def _mff(tensors: Tensors, sizes: Sizes) -> Encoder:
    return _vit({mff.mae_name(key): tensor for key, tensor in tensors.items()}, sizes)


def _vit_names(model: Classifier) -> dict[str, str]:
    return rename(model, (*mae.PREFIXES, *HEAD))


def _relative_names(model: Classifier) -> dict[str, str]:
    named = rename(model, (("encoder.", ""), *HEAD))
    return {key.replace(".rel_pos_bias.", ".attn."): ours for key, ours in named.items()}


def _stage_names(model: Classifier) -> dict[str, str]:
    return um_mae.stage_names(model, (*um_mae.STAGES, *HEAD))


def _table_names(model: Classifier) -> dict[str, str]:
    """Without pre-training's prefix, and the last norm is ``norm``, wherever it stands."""
    rows = (("encoder.", "encoder."), ("fc_norm.", "encoder.norm."), ("head.", "head."))
    named = swin_names(rename(model, rows), ("encoder.patch_embed.",))
    return {key.removeprefix("encoder."): ours for key, ours in named.items()}


def _mff_names(model: Classifier) -> dict[str, str]:
    rows = (*mff.PREFIXES, ("fc_norm.", "backbone.ln2."), ("head.", "head.fc."))
    return {mff.in_block(key): ours for key, ours in rename(model, rows).items()}


def _block_indices(model: Classifier) -> dict[str, Tensor]:
    """Which row of its table each pair of tokens reads, in every block: (1 + N, 1 + N) int64."""
    h, w = model.encoder.grid
    index = relative_vit.relative_index(torch.arange(h * w, device=CPU)[None], (h, w))[0]
    return {f"blocks.{i}.attn.{INDEX}": index for i in range(len(model.blocks()))}


def _swin_constants(model: Classifier) -> dict[str, Tensor]:
    return {key.removeprefix("encoder."): value for key, value in simmim.swin_constants(model).items()}


_FLAT = ClassifierFamily(_on(_vit), VIT_SIZES, _vit_names)
_UM_SWIN = ClassifierFamily(_on(_um_swin), (*SWIN_SIZES, "posmlp_dim"), _stage_names)
_UM_PVT = ClassifierFamily(_on(_um_pvt), (*VIT_SIZES, "sr_ratios"), _stage_names)
_SWIN = ClassifierFamily(_on(_table_swin), SWIN_SIZES, _table_names, _swin_constants, ("norm.", "head."))

CLASSIFIERS: dict[str, ClassifierFamily] = {
    "mae_vit": _FLAT,
    "um_mae_vit": _FLAT,
    "um_mae_swin": _UM_SWIN,
    "um_mae_pvt": _UM_PVT,
    "simmim_vit": ClassifierFamily(_on(_relative_vit), VIT_SIZES, _relative_names, _block_indices),
    "simmim_swin": _SWIN,
    "um_simmim_swin": _UM_SWIN,
    "um_simmim_pvt": _UM_PVT,
    "green_mim_swin": _SWIN,  # fine-tuned by SimMIM's code
    "local_mim_vit": _FLAT,  # by MAE's
    "local_mim_swin": _SWIN._replace(build=_local_mim_swin),
    "mff_vit": ClassifierFamily(
        _on(_mff), VIT_SIZES, _mff_names, head=("backbone.ln2.", "head."), classes="head.fc.weight"
    ),
}
