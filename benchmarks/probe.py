"""Accuracy of frozen features: a linear probe and nearest neighbours."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def accuracy(guess: Tensor, labels: Tensor) -> float:
    """(N,), (N,) int64 -> the share that agrees."""
    return (guess == labels).double().mean().item()


def linear_probe(known: Tensor, labels: Tensor, asked: Tensor, classes: int) -> Tensor:
    """Logistic regression by L-BFGS, from zero, weight penalty 1e-3: (N, C), (N,), (M, C) -> (M,) guesses."""
    probe = nn.Linear(known.shape[1], classes)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(known), labels) + 1e-3 * probe.weight.square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    return probe(asked).argmax(1)


def nearest_neighbours(known: Tensor, labels: Tensor, asked: Tensor, classes: int, k: int = 10) -> Tensor:
    """The most frequent label of the ``k`` nearest by cosine: (N, C), (N,), (M, C) -> (M,) guesses."""
    near = (F.normalize(asked, dim=1) @ F.normalize(known, dim=1).T).topk(min(k, len(known)), dim=1).indices
    return F.one_hot(labels[near], classes).sum(1).argmax(1)
