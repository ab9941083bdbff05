"""A tiny model of every method on every kind of encoder, for the tests that hold for all of them."""

from collections.abc import Mapping
from typing import NamedTuple

from ummim.backbones.pvt import PVTConfig
from ummim.backbones.relative_vit import RelativeViTConfig
from ummim.backbones.swin import SwinConfig
from ummim.backbones.table_swin import TableSwinConfig
from ummim.backbones.teacher import TeacherConfig
from ummim.backbones.vit import ViTConfig
from ummim.masking import AttentionMaskConfig, MaskConfig
from ummim.methods import amt, green_mim, local_mim, mae, mff, simmim, tec, um_mae
from ummim.methods.api import MethodConfig
from ummim.nn.decoder import DecoderConfig

DECODER = DecoderConfig(embed_dim=16, depth=1, num_heads=4)


class Tiny(NamedTuple):
    """A model small enough for a test."""

    config: MethodConfig
    image_size: int
    mask: MaskConfig = MaskConfig()  # noqa: B008 (frozen)
    throw: tuple[float, ...] = (0.0, 0.5)  # throwing ratios to try
    static: bool = True  # one graph for every plan; False where shapes follow the mask


METHODS: Mapping[str, Tiny] = {
    "mae": Tiny(mae.Config(ViTConfig(patch_size=4, embed_dim=24, depth=1, num_heads=3), DECODER), 24),
    "um_mae": Tiny(
        um_mae.Config(SwinConfig(8, (2, 1, 1, 1), (1, 2, 2, 4), pos_mlp_dim=6), DECODER),
        128,
        MaskConfig("uniform", 0.75, 0.25),
    ),
    "um_mae_vit": Tiny(
        um_mae.Config(ViTConfig(patch_size=4, embed_dim=24, depth=1, num_heads=3), DECODER),
        32,
        MaskConfig("uniform", 0.75, 0.25),
    ),
    "um_mae_pvt": Tiny(
        um_mae.Config(PVTConfig((8, 12, 16, 24), (2, 1, 1, 1), (1, 2, 2, 4), (2.0, 2.0, 2.0, 2.0)), DECODER),
        128,
        MaskConfig("uniform", 0.75, 0.25),
    ),
    "green_mim": Tiny(
        green_mim.Config(TableSwinConfig(8, (2, 1, 1, 1), (1, 2, 2, 4), window_size=4), DECODER),
        128,
        MaskConfig(shared_by=2),
        static=False,
    ),
    "mff": Tiny(
        mff.Config(ViTConfig(patch_size=4, embed_dim=24, depth=3, num_heads=3), DECODER, taps=(0, 2)),
        24,
    ),
    "tec": Tiny(
        tec.Config(
            ViTConfig(patch_size=16, embed_dim=64, depth=3, num_heads=2),
            DECODER,
            TeacherConfig("test_vit", "untrained", top_k=3),
        ),
        64,
    ),
    "simmim": Tiny(
        simmim.Config(RelativeViTConfig(patch_size=4, embed_dim=24, depth=2, num_heads=3, drop_path=0.0)),
        24,
        MaskConfig(ratio=0.6, unit=2),
    ),
    "simmim_swin": Tiny(
        simmim.Config(TableSwinConfig(8, (2, 1, 1, 1), (1, 2, 2, 4), window_size=4)),
        128,
        MaskConfig(ratio=0.6),
        throw=(0.0,),
    ),
    "simmim_um_swin": Tiny(
        simmim.Config(SwinConfig(8, (2, 1, 1, 1), (1, 2, 2, 4), window_size=4, pos_mlp_dim=6)), 64, throw=(0.0,)
    ),
    "simmim_pvt": Tiny(
        simmim.Config(PVTConfig((8, 12, 16, 24), (2, 1, 1, 1), (1, 2, 2, 4), (2.0, 2.0, 2.0, 2.0))), 64, throw=(0.0,)
    ),
    "local_mim": Tiny(
        local_mim.Config(
            ViTConfig(patch_size=4, embed_dim=24, depth=4, num_heads=3),
            local_mim.LocalDecoderConfig((16, 8, 12, 16), num_heads=2),
            taps=(0, 1, 2, 3),
        ),
        24,
    ),
    "local_mim_swin": Tiny(
        local_mim.Config(
            TableSwinConfig(8, (2, 1, 1, 1), (1, 2, 2, 4), window_size=4),
            local_mim.LocalDecoderConfig((8, 16, 12, 16), num_heads=2),
            target="pixel",
        ),
        128,
        MaskConfig(shared_by=2),
        static=False,
    ),
    "amt": Tiny(amt.Config(ViTConfig(patch_size=4, embed_dim=24, depth=1, num_heads=3), DECODER), 24, throw=(0.0,)),
    "amt_simmim": Tiny(
        amt.Config(
            RelativeViTConfig(4, 24, 2, 3, drop_path=0.0, relative_position=False, absolute_position=True),
            attention=AttentionMaskConfig(masked=0.44, thrown=0.26, unit=2),
        ),
        24,
        MaskConfig(ratio=0.6, unit=2),
        throw=(0.0,),
    ),
}
