"""open-mmlab/mmpretrain: MFF on ViT, whose keys are MAE's under other names.

mmpretrain's position tables are the transpose of MAE's (rows in the first half). Both are stored in checkpoints and
loaded like weights, so a model that comes from mmpretrain keeps its own.
"""

from ummim.interop.families import mae
from ummim.interop.family import Family, rename
from ummim.interop.sizes import VIT_SIZES, Sizes, Tensors, decoder, fitting, partial, shape_of
from ummim.methods import mff

# Our prefixes and the official ones; the order of the rows is the official order of keys.
PREFIXES = (
    ("encoder.cls_token", "backbone.cls_token"),
    ("encoder.pos_embed", "backbone.pos_embed"),
    ("fusion.proj_weights", "backbone.proj_weights"),
    ("encoder.patch_embed.proj.", "backbone.patch_embed.projection."),
    ("encoder.blocks.", "backbone.layers."),
    ("encoder.norm.", "backbone.ln1."),
    ("fusion.proj_layers.", "backbone.proj_layers."),
    ("decoder.mask_token", "neck.mask_token"),
    ("decoder.pos_embed", "neck.decoder_pos_embed"),
    ("embed.", "neck.decoder_embed."),
    ("decoder.blocks.", "neck.decoder_blocks."),
    ("head.norm.", "neck.ln1."),
    ("head.pred.", "neck.decoder_pred."),
    ("aggregation.layer.", "pr_dwconv."),  # PR-MIM has no official code, so these names are our own
)
IN_BLOCKS = (  # timm's names, and mmpretrain's
    (".norm1.", ".ln1."),
    (".norm2.", ".ln2."),
    (".mlp.fc1.", ".ffn.layers.0.0."),
    (".mlp.fc2.", ".ffn.layers.1."),
)
PUBLISHED_TAPS = mff.Config().taps


def build(tensors: Tensors, sizes: Sizes) -> mff.MFF:
    """MFF of these sizes; fused are all blocks if there are as many weights, else the published ones unless given.

    Raises:
        OfficialError: sizes that do not fit each other.
    """
    alike = {mae_name(key): tensor for key, tensor in tensors.items()}
    encoder = mae.vit_config(alike, sizes)
    every = shape_of(alike, "proj_weights", 0) == encoder.depth  # then there is no choice
    config = mff.Config(
        encoder=encoder,
        decoder=decoder(alike, sizes),
        taps=tuple(sizes.get("taps", range(encoder.depth) if every else PUBLISHED_TAPS)),
        norm_pix_loss=bool(sizes["norm_pix_loss"]),
    )
    image_size = mae.vit_image_size(alike, sizes, encoder.patch_size)
    fitting(config.check_sizes(image_size))
    return mff.MFF(image_size, config, *partial(alike))


def names(model: mff.MFF) -> dict[str, str]:
    """{official key: our key}, in the official order."""
    return {in_block(official): ours for official, ours in rename(model, PREFIXES).items()}


def in_block(name: str) -> str:
    """mmpretrain's name of a tensor in a block."""
    for timm, mmpretrain in IN_BLOCKS:
        name = name.replace(timm, mmpretrain)
    return name


def mae_name(official: str) -> str:
    """MAE's name of a key, where sizes are read off its tensor."""
    for timm, mmpretrain in IN_BLOCKS:
        official = official.replace(mmpretrain, timm)
    name = official.removeprefix("backbone.").removeprefix("neck.")
    return name.replace("patch_embed.projection.", "patch_embed.proj.").replace("layers.", "blocks.", 1)


FAMILIES = {"mff_vit": Family(mff.MFF, build, (*VIT_SIZES, "taps"), names)}
