"""Image classification on a pre-trained encoder: mean of the patch tokens, LayerNorm, linear head.

Source: the fine-tuning of MAE (section A.1) and UM-MAE (section 4).
"""

from dataclasses import replace

from torch import Tensor, nn

from ummim.backbones.pvt import PVT
from ummim.backbones.pyramid import MASK_PATCH
from ummim.backbones.swin import Swin
from ummim.backbones.vit import ViT
from ummim.nn.layers import LayerNorm

Encoder = ViT | Swin | PVT


class Classifier(nn.Module):
    """(B, 3, H, W) float images, normalised -> (B, num_classes) logits.

    Args:
        encoder: an encoder without a final norm, whose place the norm of the mean takes.
        num_classes: number of classes.
        train_positions: make the encoder's sine-cosine position table, if it has one, a parameter (MAE, UM-MAE).
    """

    def __init__(self, encoder: Encoder, num_classes: int, train_positions: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        if train_positions and not isinstance(encoder, Swin):
            table = encoder.pos_embed
            del encoder.pos_embed  # a buffer's name is free for a parameter only once the buffer is gone
            encoder.register_parameter("pos_embed", nn.Parameter(table))
        self.fc_norm = LayerNorm(encoder.embed_dim)
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.encoder(images)  # a ViT's (B, 1 + N, D), a pyramid's (B, h, w, C)
        tokens = x[:, 1:] if isinstance(self.encoder, ViT) else x.flatten(1, 2)  # (B, N, D) without a class token
        return self.head(self.fc_norm(tokens.mean(1)))


def build_classifier(pretrained: Encoder, num_classes: int, train_positions: bool = True) -> Classifier:
    """A classifier that starts from a copy of a pre-trained encoder, with a new head.

    The final norm and the mask tokens stay behind. An encoder that was pre-trained on the compact grid now sees
    maps twice as wide: a Swin's windows get twice the side, a PVT pools keys and values over twice the side in
    all stages but the last, as in UM-MAE's fine-tuning.

    Args:
        pretrained: a method's encoder; a ViT may be of a subclass with a class token of its own making.
        num_classes: number of classes.
        train_positions: see :class:`Classifier`.
    """
    encoder = _whole_image_encoder(pretrained)
    weights = pretrained.state_dict()
    if isinstance(pretrained, ViT):
        weights["cls_token"] = pretrained.class_token()
    copies = {key: weights[key].detach().clone() for key in encoder.state_dict()}
    encoder.load_state_dict(copies, assign=True)  # keeps each tensor's dtype and device
    return Classifier(encoder, num_classes, train_positions)


def _whole_image_encoder(pretrained: Encoder) -> Encoder:
    """A fresh encoder of the same sizes for whole images, without a final norm."""
    if isinstance(pretrained, ViT):
        image_size = pretrained.grid[0] * pretrained.config.patch_size
        return ViT(image_size, pretrained.config, final_norm=False)
    image_size = pretrained.grid[0] * MASK_PATCH
    widen = 2 if pretrained.hiding == "compact" else 1
    if isinstance(pretrained, PVT):
        *ratios, last = pretrained.config.sr_ratios
        first, second, third = (widen * ratio for ratio in ratios)
        pvt = replace(pretrained.config, sr_ratios=(first, second, third, last))
        return PVT(image_size, pvt, secondary=False, final_norm=False)
    swin = replace(pretrained.config, window_size=widen * pretrained.config.window_size)
    return Swin(image_size, swin, secondary=False, final_norm=False)
