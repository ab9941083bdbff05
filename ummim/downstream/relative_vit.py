"""SimMIM's Vision Transformer as it is fine-tuned: a table of relative positions in each block.

Source: SimMIM's fine-tuning, as BEiT's: the one table of pre-training becomes every block's own.
"""

from torch import Tensor, nn

from ummim.backbones.relative_vit import RelativePositionBias, RelativeViT, RelativeViTConfig
from ummim.masking import MaskPlan


class BlockwiseViT(RelativeViT):
    """A relative ViT for whole images: no mask token, and ``blocks.i.rel_pos_bias`` in place of ``rel_pos_bias``.

    Args:
        image_size: side of the images, in pixels.
        config: the sizes; without relative positions (AMT), no block has a table.
    """

    mask_token: None  # type: ignore[assignment]

    def __init__(self, image_size: int, config: RelativeViTConfig) -> None:
        super().__init__(image_size, config)
        self.mask_token = None
        self.rel_pos_bias = None
        if config.relative_position:
            for block in self.blocks:
                block.rel_pos_bias = RelativePositionBias(self.grid, config.num_heads)

    def forward(self, images: Tensor, plan: MaskPlan | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + N, D), normed, class token first.

        Raises:
            ValueError: a plan: nothing can be masked.
        """
        if plan is not None:
            raise ValueError("this encoder has no mask token: it sees whole images only")
        x, ids = self.embed(images, None)
        for block in self.blocks:
            table = getattr(block, "rel_pos_bias", None)
            x = block(x, None if table is None else table(ids, x.dtype))
        return self.norm(x)


def blocks_tables(encoder: RelativeViT) -> dict[str, nn.Parameter]:
    """{prefix in :class:`BlockwiseViT`: table}: a block's own, or the one that all share; empty without any."""
    shared = encoder.rel_pos_bias
    tables = {}
    for i, block in enumerate(encoder.blocks):
        own = getattr(block, "rel_pos_bias", shared)
        if own is not None:
            tables[f"blocks.{i}.rel_pos_bias.relative_position_bias_table"] = own.relative_position_bias_table
    return tables
