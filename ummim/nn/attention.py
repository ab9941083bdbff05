"""Attention whose logits have a bias, and logits that are taught themselves."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ummim.nn.layers import exact


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + bias) v, by a fused kernel on a GPU.

    Args:
        q: (B, heads, n, d) queries.
        k: (B, heads, n, d) keys.
        v: (B, heads, n, d) values.
        bias: (1 or B, 1 or heads, n, n), its last stride 1. What all samples share is passed once, not repeated.

    Returns:
        (B, heads, n, d).
    """
    if q.is_cpu:
        # The fused CPU kernel has no gradient for a bias and steps in only where none is wanted, so the forward of
        # reentrant checkpointing and its recomputation would differ in the last bit.
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """(..., m, d) @ (..., d, n) in float32 or better, under autocast too: for logits that a loss compares."""
    a, b = exact(a), exact(b)
    if a.is_meta:  # autocast knows no such device
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
