"""Small models of every family, of sizes that are no defaults and no powers of two."""

from typing import Any, NamedTuple


class Case(NamedTuple):
    """A model of a family.

    Attributes:
        sizes: every size, under the keywords of ``load_official``.
        untold: those that no tensor tells and that are not the published ones.
    """

    family: str
    sizes: dict[str, Any]
    untold: tuple[str, ...]


DECODER = {"decoder_embed_dim": 20, "decoder_depth": 2, "decoder_num_heads": 5}
WIDE = {"decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 3}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2.5}
FLAT = {"img_size": 64, "patch_size": 16, "embed_dim": 20, "depth": 4, "num_heads": 5, "mlp_ratio": 4.0}
SWIN = {"embed_dim": 12, "depth": (1, 1, 2, 1), "num_heads": (3, 3, 6, 6), "mlp_ratio": 2.0}
DEEP = {"embed_dim": 8, "depth": (2, 3, 1, 2), "num_heads": (1, 2, 2, 4), "mlp_ratio": 3.0}
PVT = {"embed_dim": (8, 12, 20, 24), "depth": (1, 2, 1, 1), "num_heads": (2, 3, 5, 4), "mlp_ratio": (3, 2, 2, 1)}
PLAIN = {"embed_dim": (12, 8, 16, 32), "depth": (2, 1, 1, 2), "num_heads": (1, 1, 2, 8), "mlp_ratio": (2, 4, 2, 2)}
HEADS = ("num_heads", "decoder_num_heads")
CASES = [
    Case("mae_vit", {**VIT, **DECODER}, HEADS),
    Case("mae_vit", {**FLAT, **WIDE, "norm_pix_loss": False}, (*HEADS, "norm_pix_loss")),
    Case("um_mae_vit", {**VIT, **DECODER, "vis_mask_ratio": 0.25}, HEADS),
    Case("um_mae_vit", {**FLAT, **WIDE, "vis_mask_ratio": 0.0}, HEADS),
    Case(
        "um_mae_swin",
        {**SWIN, **DECODER, "img_size": 64, "window_size": 4, "posmlp_dim": 5, "vis_mask_ratio": 0.25},
        ("decoder_num_heads", "window_size"),
    ),
    Case(
        "um_mae_swin",
        {**DEEP, **WIDE, "img_size": 128, "window_size": 2, "posmlp_dim": 6, "norm_pix_loss": False},
        ("decoder_num_heads", "window_size", "norm_pix_loss"),
    ),
    Case(
        "um_mae_pvt",
        {**PVT, **DECODER, "img_size": 64, "sr_ratios": (2, 2, 1, 1), "vis_mask_ratio": 0.25},
        (*HEADS, "sr_ratios"),
    ),
    Case("um_mae_pvt", {**PLAIN, **WIDE, "img_size": 128, "sr_ratios": (4, 2, 1, 1)}, HEADS),
    Case("simmim_vit", VIT, ()),
    Case("simmim_vit", {**FLAT, "norm_pix_loss": True}, ("norm_pix_loss",)),
    Case("simmim_swin", {**SWIN, "img_size": 64, "window_size": 4}, ()),
    Case("simmim_swin", {**DEEP, "img_size": 128, "window_size": 2, "norm_pix_loss": True}, ("norm_pix_loss",)),
    Case("simmim_swin", {**SWIN, "img_size": 96, "window_size": 3}, ()),
    Case("um_simmim_swin", {**SWIN, "img_size": 64, "window_size": 4, "posmlp_dim": 5}, ("img_size", "window_size")),
    Case("um_simmim_swin", {**DEEP, "img_size": 96, "window_size": 3, "posmlp_dim": 6}, ("img_size", "window_size")),
    Case("um_simmim_pvt", {**PVT, "img_size": 64, "sr_ratios": (2, 4, 1, 1)}, ("num_heads", "sr_ratios")),
    Case("um_simmim_pvt", {**PLAIN, "img_size": 96, "sr_ratios": (8, 4, 2, 1)}, ("num_heads",)),
    Case("green_mim_swin", {**SWIN, **DECODER, "img_size": 128, "window_size": 4}, ("decoder_num_heads",)),
    Case(
        "green_mim_swin",
        {**DEEP, **WIDE, "img_size": 96, "window_size": 3, "row_major_merge": True, "norm_pix_loss": False},
        ("decoder_num_heads", "row_major_merge", "norm_pix_loss"),
    ),
    Case(
        "local_mim_vit",
        {**FLAT, **DECODER, "decoder_embed_dim": 20, "target": "HOG", "hog_nbins": 6, "taps": (0, 1, 2, 3)},
        (*HEADS, "taps"),
    ),
    Case(
        "local_mim_vit",
        {**VIT, **WIDE, "depth": 5, "decoder_embed_dim": (24, 12, 12, 36), "target": "Pixel", "taps": (1, 2, 3, 4)},
        (*HEADS, "taps"),
    ),
    Case(
        "local_mim_swin",
        {**SWIN, **WIDE, "decoder_embed_dim": (12, 24, 12, 36), "img_size": 96, "window_size": 3, "target": "HOG",
         "hog_nbins": 18},
        ("decoder_num_heads",),
    ),  # fmt: skip
    Case(
        "local_mim_swin",
        {**DEEP, **DECODER, "img_size": 128, "window_size": 4, "target": "Pixel", "norm_pix_loss": False},
        ("decoder_num_heads", "norm_pix_loss"),
    ),
    Case("mff_vit", {**VIT, **DECODER, "taps": (0, 2)}, (*HEADS, "taps")),
    Case("mff_vit", {**FLAT, **WIDE, "taps": (0, 1, 2, 3)}, HEADS),
]  # fmt: skip
