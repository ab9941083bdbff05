"""facebookresearch/mae: MAE on ViT."""

from ummim.backbones.vit import ViTConfig
from ummim.interop.family import Family, rename
from ummim.interop.sizes import (
    VIT_SIZES,
    Sizes,
    Tensors,
    agreed,
    decoder,
    depth_of,
    fitting,
    kernel_side,
    mlp_ratio,
    one,
    partial,
    pixel_side,
    shape_of,
    table_side,
)  # fmt: skip
from ummim.methods import mae

VIT_H_WIDTH, VIT_H_HEADS = 1280, 16

# Our prefixes and the official ones; the order of the rows is the official order of keys.
PREFIXES = (
    ("encoder.cls_token", "cls_token"),
    ("encoder.pos_embed", "pos_embed"),
    ("encoder.vis_mask_token", "vis_mask_token"),
    ("decoder.mask_token", "mask_token"),
    ("decoder.pos_embed", "decoder_pos_embed"),
    ("encoder.patch_embed.", "patch_embed."),
    ("encoder.blocks.", "blocks."),
    ("encoder.norm.", "norm."),
    ("embed.", "decoder_embed."),
    ("decoder.blocks.", "decoder_blocks."),
    ("head.norm.", "decoder_norm."),
    ("head.pred.", "decoder_pred."),
    ("aggregation.layer.", "pr_dwconv."),  # PR-MIM has no official code, so these names are our own
)


def vit_config(tensors: Tensors, sizes: Sizes) -> ViTConfig:
    """A ViT's sizes, from the official keys; the patch also from the head that predicts its pixels."""
    widths = (("cls_token", 2), ("pos_embed", 2), ("patch_embed.proj.bias", 0))
    dim = one(sizes, "embed_dim", agreed(768, *(shape_of(tensors, *at) for at in widths)))
    patch = agreed(16, pixel_side(tensors, "decoder_pred"), kernel_side(tensors, "patch_embed.proj.weight"))
    return ViTConfig(
        patch_size=one(sizes, "patch_size", patch),
        embed_dim=dim,
        depth=one(sizes, "depth", depth_of(tensors, "blocks")),
        num_heads=one(sizes, "num_heads", VIT_H_HEADS if dim == VIT_H_WIDTH else max(1, dim // 64)),
        mlp_ratio=one(sizes, "mlp_ratio", mlp_ratio(tensors, "blocks.0", dim)),
    )


def vit_image_size(tensors: Tensors, sizes: Sizes, patch: int, decoder_table: str = "decoder_pos_embed") -> int:
    """Side of the images, from the position tables."""
    sides = (table_side(tensors, table, cls_token=True) for table in ("pos_embed", decoder_table))
    return one(sizes, "img_size", agreed(14, *sides) * patch)


def build(tensors: Tensors, sizes: Sizes) -> mae.MAE:
    """MAE of these sizes. Raises OfficialError where they do not fit each other."""
    config = mae.Config(
        encoder=vit_config(tensors, sizes),
        decoder=decoder(tensors, sizes),
        norm_pix_loss=bool(sizes["norm_pix_loss"]),
    )
    image_size = vit_image_size(tensors, sizes, config.encoder.patch_size)
    fitting(config.check_sizes(image_size))
    return mae.MAE(image_size, config, *partial(tensors))


FAMILIES = {"mae_vit": Family(mae.MAE, build, VIT_SIZES, lambda model: rename(model, PREFIXES))}
