"""Heads on an encoder that is not trained: MAE's linear probe, and one query that attends to its tokens.

Sources: the linear probing of MAE (section A.1); attentive probing as in CAE (Chen et al., "Context Autoencoder for
Self-Supervised Representation Learning") and V-JEPA (Bardes et al.).
"""

import copy

import torch
import torch.distributed as dist
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from ummim.downstream.classify import Classifier
from ummim.nn.layers import LayerNorm


class BatchNorm(nn.Module):
    """(B, D) features of a frozen encoder, normalised: batch normalisation without scale and shift (eps 1e-6, as MAE).

    In training by the micro-batches of all ranks together, else by the running mean and variance, which are therefore
    the same on every rank. No gradient goes back through it.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, eps: float = 1e-6, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            exact = x.double()
            sums = torch.stack([torch.ones_like(exact[0]) * len(x), exact.sum(0), exact.square().sum(0)])  # (3, D)
            if dist.is_initialized():
                dist.all_reduce(sums)
            count, mean = sums[0], sums[1] / sums[0]
            var = (sums[2] / count - mean.square()).clamp(min=0)
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = var * count / (count - 1).clamp(min=1)
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        return ((x - mean) * (var + self.eps).rsqrt()).to(x.dtype)


class Probe(nn.Module):
    """(B, 3, H, W) float images, normalised -> (B, classes) logits, by a head on a frozen encoder in eval mode.

    Args:
        backbone: a classifier, of which features or tokens are taken; its own head falls away.
        classes: number of classes.
        attentive: pool the tokens by attention instead of taking the features.
    """

    def __init__(self, backbone: Classifier, classes: int, attentive: bool) -> None:
        super().__init__()
        dim, heads = backbone.encoder.embed_dim, backbone.encoder.config.num_heads
        backbone.head = nn.Identity()  # type: ignore[assignment]
        self.backbone = backbone.requires_grad_(False)
        self.attentive = attentive
        if attentive:
            heads = heads if isinstance(heads, int) else heads[-1]
            pool = AttentionPoolLatent(dim, num_heads=heads, norm_layer=LayerNorm)
            below: list[nn.Module] = [LayerNorm(dim), pool]
        else:
            below = [BatchNorm(dim)]
        linear = nn.Linear(dim, classes)
        self.head = nn.Sequential(*below, linear)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    def train(self, mode: bool = True) -> "Probe":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone.tokens(images) if self.attentive else self.backbone.features(images)
        return self.head(x)

    def as_classifier(self) -> Classifier:
        """A linear probe's logits as those of a classifier (a copy): what its normalisation by the running mean and
        variance does is an affine map, which the head takes in."""
        assert not self.attentive
        norm, linear = self.head
        assert isinstance(norm, BatchNorm) and isinstance(linear, nn.Linear)
        classifier = copy.deepcopy(self.backbone)
        classifier.head = nn.Linear(linear.in_features, linear.out_features)
        weight = linear.weight.detach().double() * (norm.running_var.double() + norm.eps).rsqrt()
        bias = linear.bias.detach().double() - weight @ norm.running_mean.double()
        classifier.head.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        return classifier.train(self.training)

    def blocks(self) -> list[nn.Module]:
        """Units of activation checkpointing: none, for nothing is kept of a frozen encoder."""
        return []
