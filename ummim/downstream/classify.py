"""Image classification on a pre-trained encoder of any kind: pooled tokens, a linear head.

Source: the fine-tuning of MAE (section A.1), SimMIM (section 4.1), UM-MAE (section 4).
"""

import re
from typing import Literal

from torch import Tensor, nn

from ummim.backbones.pvt import PVT
from ummim.backbones.relative_vit import RelativeViT
from ummim.backbones.swin import Swin
from ummim.backbones.table_swin import TableSwin
from ummim.backbones.vit import ViT
from ummim.downstream.adapt import Adapted, Encoder, Pretrained, for_whole_images
from ummim.downstream.drop_path import set_drop_path
from ummim.errors import UserError
from ummim.nn.layers import LayerNorm, eps_of, set_eps

Pool = Literal["mean", "class"]

# Parameters besides vectors that are not decayed (MAE, SimMIM).
UNDECAYED = ("cls_token", "pos_embed", "relative_position_bias_table")


class Classifier(nn.Module):
    """(B, 3, H, W) float images, normalised -> (B, num_classes) logits.

    Mean pooling: the mean of the patch tokens, a LayerNorm, the head; the encoder's own norm falls away. In Microsoft's
    Swin, its norm stays before the mean, and there is no other. Class pooling: the encoder's norm, the class token, the
    head. The head starts from weights of deviation 2e-5 (MAE, SimMIM's ViT, UM-MAE), in Microsoft's Swin 0.02.

    Args:
        encoder: an encoder for whole images; the norm that the pooling does without is taken from it.
        num_classes: number of classes.
        train_positions: make the encoder's sine-cosine position table, if it has one, a parameter (MAE, UM-MAE).
        pool: what the head sees.
        norm_last: let the norm stand behind the mean in Microsoft's Swin, too (LocalMIM).

    Attributes:
        adapted: what became of the pre-training's tensors, where the encoder comes from one.

    Raises:
        UserError: class pooling in an encoder without a class token; ``norm_last`` where it changes nothing.
    """

    adapted: Adapted | None = None

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        train_positions: bool = True,
        pool: Pool = "mean",
        norm_last: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.pool, self.norm_last = encoder, pool, norm_last
        vit = isinstance(encoder, ViT | RelativeViT)
        if pool == "class" and not vit:
            raise UserError(f"pool: a {type(encoder).__name__} has no class token to take; set it to mean")
        if norm_last and not isinstance(encoder, TableSwin):
            raise UserError("norm_last: is for Microsoft's Swin; in others it stands there in any case: remove it")
        if train_positions and isinstance(encoder, ViT | PVT) and "pos_embed" not in dict(encoder.named_parameters()):
            table = encoder.pos_embed
            del encoder.pos_embed  # a buffer's name is free for a parameter only once the buffer is gone
            encoder.register_parameter("pos_embed", nn.Parameter(table))
        own_norm = pool == "class" or (isinstance(encoder, TableSwin) and not norm_last)
        if own_norm and isinstance(encoder.norm, nn.Identity):
            encoder.norm = LayerNorm(encoder.embed_dim)
        elif not own_norm:
            encoder.norm = nn.Identity()
        self.fc_norm: nn.Module = nn.Identity() if own_norm else LayerNorm(encoder.embed_dim)
        if vit or norm_last:
            set_eps(self.fc_norm, eps_of(encoder))
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02 if isinstance(encoder, TableSwin) else 2e-5)
        nn.init.zeros_(self.head.bias)

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, [1 +] N, D): what the encoder makes of the images, a class token first."""
        x = self.encoder(images)  # a ViT's (B, 1 + N, D), a pyramid's (B, h, w, C)
        return x if x.ndim == 3 else x.flatten(1, 2)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D): pooled and normed, what the head sees."""
        x = self.tokens(images)
        if self.pool == "class":
            return x[:, 0]
        if isinstance(self.encoder, ViT | RelativeViT):
            x = x[:, 1:]
        return self.fc_norm(x.mean(1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes)."""
        return self.head(self.features(images))

    def blocks(self) -> list[nn.Module]:
        """The encoder's Transformer blocks, first to last."""
        return encoder_blocks(self.encoder)

    def layer_ids(self) -> dict[str, int]:
        """{parameter name: id} for layer-wise learning rates; the head's id is the number of blocks + 1.

        0: embeddings, positions, class token. k + 1: block k of the flat list. A merge of 2x2 tokens counts with the
        block before it in Microsoft's Swin (SimMIM), with the one behind it in UM-MAE's pyramids. Last: norms, head.
        """
        last = len(self.blocks()) + 1
        own = {id(block): i + 1 for i, block in enumerate(self.blocks())}
        prefixes = {f"{name}.": own[id(module)] for name, module in self.named_modules() if id(module) in own}
        prefixes |= self._merge_ids()
        ids = {}
        for name, _ in self.named_parameters():
            behind = name.startswith(("encoder.norm.", "fc_norm.", "head."))
            ids[name] = next((i for prefix, i in prefixes.items() if name.startswith(prefix)), last if behind else 0)
        return ids

    def _merge_ids(self) -> dict[str, int]:
        """{prefix of a merge's parameters: id}."""
        if isinstance(self.encoder, ViT | RelativeViT):
            return {}
        table = isinstance(self.encoder, TableSwin)
        name, behind = ("layers.{}.downsample.", 0) if table else ("stages.{}.merge.", 1)
        depths = self.encoder.config.depths
        return {f"encoder.{name.format(s)}": sum(depths[:s]) + behind for s in range(1, 4)}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed: vectors, tokens, and tables of positions."""
        tables = re.compile(rf"(^|\.)({'|'.join(UNDECAYED)})$")
        return {name for name, value in self.named_parameters() if value.ndim <= 1 or tables.search(name)}


def encoder_blocks(encoder: nn.Module) -> list[nn.Module]:
    """The Transformer blocks of an encoder for whole images, first to last."""
    if isinstance(encoder, ViT | RelativeViT):
        return list(encoder.blocks)
    assert isinstance(encoder, Swin | PVT | TableSwin)
    stages = encoder.layers if isinstance(encoder, TableSwin) else encoder.stages
    return [block for stage in stages for block in stage.blocks]  # type: ignore[union-attr]


def build_classifier(
    encoder: Pretrained,
    classes: int,
    pool: Pool = "mean",
    drop_path: float = 0.0,
    image_size: int | None = None,
    train_positions: bool = True,
    norm_last: bool = False,
) -> Classifier:
    """A classifier that starts from a copy of a pre-trained encoder, with a new head.

    Args:
        encoder: a method's encoder, or one that ``load_encoder`` or ``new_encoder`` gave; see
            :func:`ummim.downstream.adapt.for_whole_images` for what becomes of it.
        classes: number of classes.
        pool: see :class:`Classifier`.
        drop_path: chance that the last block's branches are skipped for a sample; it grows linearly from 0.
        image_size: side of the images, in pixels; the encoder's unless given.
        train_positions: see :class:`Classifier`.
        norm_last: see :class:`Classifier`.

    Raises:
        UserError: an image size that does not fit the encoder, or a class token or a place of the norm that it has not.
    """
    adapted = for_whole_images(encoder, image_size)
    before = list(adapted.encoder.state_dict())
    model = Classifier(adapted.encoder, classes, train_positions, pool, norm_last)
    after = list(model.encoder.state_dict())
    set_drop_path(model.blocks(), drop_path)
    model.adapted = adapted._replace(
        left=(*adapted.left, *(key for key in before if key not in after and key not in adapted.fresh)),
        fresh=tuple(key for key in after if key not in before or key in adapted.fresh),
    )
    return model
