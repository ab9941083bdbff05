"""LayneH/GreenMIM: GreenMIM on Swin. The decoder's order is the mended one (docs/fidelity.md, Q-G6)."""

from ummim.backbones.table_swin import UNIT
from ummim.interop.families.table_swin import position_indices, stored_window, swin_config, swin_names
from ummim.interop.family import Family, rename
from ummim.interop.sizes import VIT_SIZES, Sizes, Tensors, decoder, fitting, one, partial, table_side
from ummim.methods import green_mim

SWIN_SIZES = (*VIT_SIZES, "window_size", "row_major_merge")

# Our prefixes and the official ones; the order of the rows is the official order of keys.
PREFIXES = (
    ("decoder.mask_token", "mask_token"),
    ("decoder.pos_embed", "decoder_pos_embed"),
    ("encoder.", "encoder."),
    ("embed.", "decoder_embed."),
    ("decoder.blocks.", "decoder_blocks."),
    ("head.norm.", "decoder_norm."),
    ("head.pred.", "decoder_pred."),
    ("aggregation.layer.", "pr_dwconv."),  # PR-MIM has no official code, so these names are our own
)


def build(tensors: Tensors, sizes: Sizes) -> green_mim.GreenMIM:
    """GreenMIM of these sizes, which may say ``row_major_merge`` for a checkpoint of the first release.

    Raises:
        OfficialError: sizes that do not fit each other.
    """
    side = table_side(tensors, "decoder_pos_embed") or stored_window(tensors, 0)
    image_size = one(sizes, "img_size", side * UNIT)
    config = green_mim.Config(
        encoder=swin_config(tensors, sizes, image_size),
        decoder=decoder(tensors, sizes),
        norm_pix_loss=bool(sizes["norm_pix_loss"]),
        row_major_merge=bool(sizes.get("row_major_merge", False)),
    )
    fitting(config.check_sizes(image_size))
    return green_mim.GreenMIM(image_size, config, *partial(tensors))


def names(model: green_mim.GreenMIM) -> dict[str, str]:
    """{official key: our key}, in the official order."""
    return swin_names(rename(model, PREFIXES), ("mask_token", "decoder_pos_embed", "encoder.patch_embed."))


FAMILIES = {"green_mim_swin": Family(green_mim.GreenMIM, build, SWIN_SIZES, names, constants=position_indices)}
