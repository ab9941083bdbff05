"""What stands between TEC's encoder and its losses: an adaptor of all layers, and a light decoder that runs twice,
once to predict features and once to predict attention.

Source: "Towards Sustainable Self-supervised Learning" (TEC; Gao et al., 2022), section 3, and its official code.
"""

from collections.abc import Sequence

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from ummim.nn.attention import exact_product
from ummim.nn.decoder import DecoderConfig
from ummim.nn.layers import LayerNorm, init_mae, sincos_table, take

GROUP = 3  # consecutive layers that the adaptor fuses


class Adaptor(nn.Module):
    """All layers' tokens -> one token: groups of three consecutive layers, each fused and refined, and their sum.

    Its norms have PyTorch's eps, 1e-5; all others of the method have 1e-6. So it is in the official code.
    """

    def __init__(self, dim: int, depth: int, hidden: int) -> None:
        super().__init__()
        self.norm_before = nn.LayerNorm(depth * dim)
        self.fuse = nn.ModuleList(nn.Linear(GROUP * dim, dim) for _ in range(depth // GROUP))
        self.refine = nn.ModuleList(Mlp(dim, hidden) for _ in range(depth // GROUP))
        self.norm_after = nn.LayerNorm(dim)
        self.apply(init_mae)

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        """Tensors of one shape (B, n, D), one for each layer -> (B, n, D)."""
        groups = self.norm_before(torch.cat(list(layers), dim=-1)).chunk(len(self.fuse), dim=-1)  # of (B, n, 3D)
        fused = [fuse(group) for fuse, group in zip(self.fuse, groups, strict=True)]
        refined = [tokens + refine(tokens) for refine, tokens in zip(self.refine, fused, strict=True)]
        return self.norm_after(torch.stack(refined).sum(0))


class MaskedEmbed(nn.Module):
    """One pass's way into the decoder: (B, 1 + V, D) -> (B, 1 + V + n, d), n mask tokens behind."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, out).apply(init_mae)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, out))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, masked: int) -> Tensor:
        return torch.cat([self.proj(latent), self.mask_token.expand(latent.shape[0], masked, -1)], dim=1)


class SharedBlock(Block):
    """A Transformer block that both passes go through in one call.

    A call for each would give its weights two gradients in a backward pass that recomputes activations, which ZeRO
    refuses, and under ZeRO-3 gather them twice.
    """

    def forward(self, feature: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(feature), super().forward(attention)


class SharedDecoder(nn.Module):
    """Position table and Transformer blocks, without a norm: MAE's decoder, but for what each pass has of its own."""

    pos_embed: Tensor

    def __init__(self, grid: tuple[int, int], config: DecoderConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.register_buffer("pos_embed", sincos_table(dim, grid, cls_token=True))  # (1, 1 + N, d)
        self.blocks = nn.ModuleList(
            SharedBlock(dim, config.num_heads, config.mlp_ratio, qkv_bias=True, norm_layer=LayerNorm)
            for _ in range(config.depth)
        )
        self.apply(init_mae)

    def position(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, n) -> (B, 1 + n, d): position embedding of the class token and of grid tokens."""
        return F.embedding(F.pad(ids + 1, (1, 0)), self.pos_embed[0]).to(dtype)  # the class token's row is 0

    def forward(
        self, feature: Tensor, feature_at: Tensor, attention: Tensor, attention_at: Tensor
    ) -> tuple[Tensor, Tensor]:
        """For each pass a class token and patches (B, 1 + n, d), and the patches' ids (B, n) -> the same tokens."""
        feature = feature + self.position(feature_at, feature.dtype)
        attention = attention + self.position(attention_at, attention.dtype)
        for block in self.blocks:
            feature, attention = block(feature, attention)
        return feature, attention


class FeatureHead(nn.Module):
    """Final norm and linear prediction of the teacher's features, which a caller applies apart: d -> D channels."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.pred = nn.Linear(dim, out)
        self.apply(init_mae)


class QueryKey(nn.Linear):
    """One linear map to queries and keys, each made only of the tokens that need it."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__(dim, 2 * width)

    def forward(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(B, m, d), (B, n, d) -> (B, m, D), (B, n, D)."""
        (query, key), (query_bias, key_bias) = self.weight.chunk(2), self.bias.chunk(2)
        return F.linear(queries, query, query_bias), F.linear(keys, key, key_bias)


class AttentionHead(nn.Module):
    """Final norm, which the caller applies, and the attention logits of the class token and of some patches over all
    patches."""

    def __init__(self, dim: int, width: int, heads: int, scale: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.norm = LayerNorm(dim)
        self.qk = QueryKey(dim, width)
        self.apply(init_mae)

    def forward(self, sequence: Tensor, at: Tensor, queries: Tensor) -> Tensor:
        """A class token and all patches (B, 1 + N, d), normed; the patches' ids (B, N); and the ids of queries (B, k)
        -> (B, heads, 1 + k, N), keys row-major, float32 or better."""
        patches = take(sequence[:, 1:], at.argsort(dim=1))  # (B, N, d), row-major
        chosen = torch.cat([sequence[:, :1], take(patches, queries)], dim=1)  # (B, 1 + k, d)
        q, k = self.qk(chosen, patches)  # (B, 1 + k, D), (B, N, D)
        q, k = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k))  # (B, heads, 1 + k, .), (.., N, .)
        return exact_product(q, k.transpose(2, 3)) * self.scale
