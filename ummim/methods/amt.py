"""AMT, attention-driven masking and throwing, on MAE and on SimMIM: what the encoder attends to is masked or thrown.

Source: "Good Helper Is Around You: Attention-Driven Masked Image Modeling", section 3, and its official code.

    every 40 epochs: all images, whole ──> encoder ──> attention maps ─┐
                                                                      ├─> 45% masked, 40% thrown, 15% visible tokens
                                     in between: random crops, flips ─┘

A plan's thrown tokens are in neither encoder, decoder nor loss, and nothing fills them in: on a plan the methods are
MAE and SimMIM with plain partial reconstruction. How maps become masks is the data pipeline's.

Mended here (docs/fidelity.md): the official code weighs every crop by the map's top left cells (Q-A1;
``attention.legacy_crop`` does that too), leaves LayerScale out of SimMIM's last block when it computes a map (Q-A2),
and SimMIM's loss fails after the first refresh (Q-A3).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ummim.backbones.relative_vit import RelativeViTConfig
from ummim.backbones.vit import ViTConfig
from ummim.errors import RecipeError
from ummim.masking import AttentionMaskConfig, AttentionSampler, MaskConfig
from ummim.methods import mae, simmim
from ummim.methods.api import Method, MethodConfig
from ummim.nn.aggregation import PartialConfig
from ummim.nn.decoder import DecoderConfig


@dataclass(frozen=True)
class Config(MethodConfig):
    """AMT on MAE (``encoder.kind: vit``) or on SimMIM (``encoder.kind: relative_vit``).

    Attributes:
        encoder: the encoder, by its ``kind``.
        decoder: MAE's decoder; SimMIM has none.
        norm_pix_loss: regress pixels normalised by their patch's mean and deviation.
        attention: how the encoder's attention masks.
    """

    encoder: ViTConfig | RelativeViTConfig = field(default_factory=ViTConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    norm_pix_loss: bool = False
    attention: AttentionMaskConfig = AttentionMaskConfig()  # frozen; a class attribute, to stand over the property

    @property
    def mask_kinds(self) -> tuple[str, ...]:
        return ("random",)

    @property
    def partial_reconstruction(self) -> bool:
        """AMT throws by itself: ``attention.thrown``."""
        return False

    @property
    def framework(self) -> mae.Config | simmim.Config:
        """The method that is trained."""
        if isinstance(self.encoder, ViTConfig):
            return mae.Config(self.encoder, self.decoder, self.norm_pix_loss)
        return simmim.Config(self.encoder, self.norm_pix_loss)

    def mask_grid(self, image_size: int) -> tuple[int, int]:
        return self.framework.mask_grid(image_size)

    def check_sizes(self, image_size: int) -> Iterable[tuple[str, str]]:
        yield from self.framework.check_sizes(image_size)
        if self.attention.refresh_epochs < 1:
            yield "method.attention.refresh_epochs", "must be at least 1"
        (h, w), unit, masked = self.mask_grid(image_size), self.attention.unit, self.attention.masked
        if unit < 1 or h % unit or w % unit:
            yield "method.attention.unit", f"units of {unit} tokens do not tile the grid {h}x{w}; choose a divisor"
        if not 0 < masked < 1:
            yield "method.attention.masked", "is a share of all tokens: choose a value between 0 and 1, such as 0.45"
        if not 0 <= self.attention.thrown < 1:
            yield "method.attention.thrown", "is a share of all tokens: choose a value from 0 to below 1, such as 0.4"
        for key, attention, remedy in (
            ("masked", replace(self.attention, thrown=0.0), "choose a value further from 0 and 1, such as 0.45"),
            ("thrown", self.attention, "masked and thrown together must stay below 1"),
        ):
            try:
                AttentionSampler((h, w), attention)
            except ValueError as error:
                yield f"method.attention.{key}", f"{error}: {remedy}"

    def check(self, image_size: int, mask: MaskConfig, throw_ratio: float) -> None:
        if throw_ratio > 0:
            raise RecipeError("AMT throws by itself: set method.attention.thrown, and this to 0", key="throw_ratio")
        super().check(image_size, mask, throw_ratio)

    def build(self, image_size: int, partial: PartialConfig, throwing: bool) -> "AMTMAE | AMTSimMIM":
        framework = self.framework
        if isinstance(framework, mae.Config):
            return AMTMAE(image_size, framework)
        return AMTSimMIM(image_size, framework)


class AMT(Method):
    """What AMT adds to a method on a ViT: the encoder's attention maps. The weights are the method's own."""

    @torch.no_grad()
    def attention_map(self, images: Tensor) -> Tensor:
        """What the class token attends to in the encoder's last block: (B, 3, H, W) -> (B, h, w) float32 in [0, 1].

        Each head's attention to the patches is scaled to span [0, 1]; the map is the mean over the heads.
        """
        attention = self.encoder.blocks[-1].attn  # type: ignore[union-attr, index]
        outputs: list[Tensor] = []
        # The encoder is run as a whole, and its last qkv overheard: under ZeRO-3 no weight is at hand otherwise.
        hook = attention.qkv.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        try:
            self.encoder(images)
        finally:
            hook.remove()
        return class_attention(outputs[0], attention.num_heads).unflatten(1, self.grid)


class AMTMAE(AMT, mae.MAE):
    """MAE, with attention maps."""


class AMTSimMIM(AMT, simmim.SimMIM):
    """SimMIM on a ViT, with attention maps."""


def class_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """(B, 1 + N, 3D) queries, keys and values of a block -> (B, N): the class token's attention to each patch.

    Scaled to [0, 1] in each head, then averaged. That scaling takes out whatever is the same for all patches: the
    class token's attention to itself, and a relative position bias between class token and patches.
    """
    b, n, _ = qkv.shape
    q, k, _ = qkv.float().view(b, n, 3, num_heads, -1).unbind(2)  # (B, 1 + N, heads, D / heads)
    logits = torch.einsum("bhd,bnhd->bhn", q[:, 0], k[:, 1:]) * q.shape[-1] ** -0.5  # (B, heads, N)
    attention = logits.softmax(dim=-1)
    low, high = attention.amin(-1, keepdim=True), attention.amax(-1, keepdim=True)
    return ((attention - low) / (high - low).clamp_min(torch.finfo(attention.dtype).tiny)).mean(1)
