"""k nearest neighbours: no training, the features of the training images vote.

Source: the weighted k-NN classifier of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance
Discrimination" (CVPR 2018), with the temperature of 0.07 that DINO and others keep.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ummim.data import ShardIndex
from ummim.data.normalise import normalise
from ummim.downstream.classify import Classifier
from ummim.downstream.evaluate import Accuracy, Parts, evaluating, rank_of_label, write_evaluation
from ummim.downstream.probe import Probe
from ummim.downstream.recipe import ClassifyConfig, ClassifyRecipe
from ummim.engine.faults import Interrupts, agreed_stop
from ummim.engine.watchdog import EVALUATE
from ummim.engine.zero import World

QUERIES, BANK = 256, 2**16  # validation and training images that are compared at once: 64 MiB of similarities


class Features(NamedTuple):
    """What one rank has computed."""

    rows: Tensor  # (n,) int64, of the set's table
    labels: Tensor  # (n,) int64
    values: Tensor  # (n, D) float32 of length 1
    unreadable: int  # on all ranks


def nearest_neighbours(recipe: ClassifyRecipe, model: Classifier | Probe, sets: Any, world: World, beat: Any) -> int:
    """Classify the validation images by their neighbours among the training images, both seen as in evaluation.

    Leaves ``evaluation.json``; returns the exit code.
    """
    config = recipe.classify
    model.to(world.device)
    with Interrupts() as interrupts:

        def parts_of(index: ShardIndex) -> Parts:
            beating = partial(beat, 0, EVALUATE)
            return Parts(index, recipe.data, recipe.micro_batch, world, lambda: interrupts.code, beating)

        accuracy = classify(model, parts_of(sets.train), parts_of(sets.val), config)
        if accuracy is None:
            interrupts.leave()
            return agreed_stop(interrupts.code, world)
    if world.is_main:
        told = {"recipe": recipe.name, "step": 0, "epoch": 0.0, "val_shards": config.val_shards}
        told |= {"val_digest": sets.val.digest, "train_images": len(sets.train), "train_digest": sets.train.digest}
        write_evaluation(Path(recipe.output), told, {"weights": accuracy})
        print(f"{config.neighbours} nearest neighbours: {accuracy}", flush=True)
    return 0


def classify(model: Any, known: Parts, asked: Parts, config: ClassifyConfig) -> Accuracy | None:
    """The accuracy on ``asked`` of the votes of ``known``, by ``model.features``. None where it was interrupted."""
    found: list[Features] = []
    with evaluating(model):
        for parts in (known, asked):
            features = compute(model, parts)
            if features is None:
                return None
            found.append(features)
        train, val = found
        return vote(train, gathered(val, asked.world), config, asked.world, asked.code)


def compute(model: Any, parts: Parts) -> Features | None:
    """This rank's features of a set. None where it was interrupted."""
    rows, labels, values = [], [], []
    for part in parts:
        first = part.number * parts.batch
        numbers = torch.arange(first, first + parts.batch, device=part.counted.device)
        features = model.features(normalise(part.batch.images)).float()
        rows.append(numbers[part.counted])
        labels.append(part.batch.labels[part.counted])
        values.append(F.normalize(features, dim=1)[part.counted])
    if parts.interrupted:
        return None
    return Features(torch.cat(rows), torch.cat(labels), torch.cat(values), len(parts.bad))


def gathered(mine: Features, world: World) -> Features:
    """All ranks' features, by row, on every rank."""
    everywhere: list[Any] = [None] * world.size
    dist.all_gather_object(everywhere, tuple(tensor.cpu() for tensor in mine[:3]))
    rows, labels, values = (torch.cat(parts).to(world.device) for parts in zip(*everywhere, strict=True))
    return by_row(Features(rows, labels, values, mine.unreadable))


def by_row(features: Features) -> Features:
    """The same, with ascending rows."""
    rows, order = features.rows.sort()
    if torch.equal(rows, features.rows):
        return features
    return Features(rows, features.labels[order], features.values[order], features.unreadable)


def vote(
    train: Features, val: Features, config: ClassifyConfig, world: World, code: Callable[[], int] = lambda: 0
) -> Accuracy | None:
    """The accuracy of the votes of each validation image's neighbours; of equally near ones, the first rows count.

    train: this rank's part; val: all, the same on every rank. None where it was interrupted.
    """
    train = by_row(train)
    top1 = top5 = 0
    for begin in range(0, len(val.rows), QUERIES):
        if agreed_stop(code(), world):
            return None
        queries, labels = val.values[begin : begin + QUERIES], val.labels[begin : begin + QUERIES]
        near, their = nearest(queries, train, config.neighbours, world)  # (Q, k)
        near = near.double()
        weights = ((near - near[:, :1]) / config.temperature).exp()  # of the nearest: 1, however small the temperature
        votes = weights.new_zeros(len(queries), config.classes).scatter_add_(1, their, weights)
        rank = rank_of_label(votes, labels)
        top1, top5 = top1 + int((rank < 1).sum()), top5 + int((rank < 5).sum())
    count = len(val.rows)
    return Accuracy(count, 100 * top1 / max(count, 1), 100 * top5 / max(count, 1), None, val.unreadable)


def nearest(queries: Tensor, train: Features, k: int, world: World) -> tuple[Tensor, Tensor]:
    """(Q, D) -> (Q, k) cosine similarities and labels of the k nearest training images of all ranks, nearest first, and
    of equally near ones those of the first rows.

    train: this rank's part, its rows ascending. Where there are fewer than k, the missing ones' similarities are minus
    infinity.
    """
    values, at = greatest(queries, train.values, k)
    here = values.shape[1]
    mine = torch.full((3, len(queries), k), -torch.inf, dtype=torch.float64, device=queries.device)
    mine[1], mine[2] = torch.inf, 0
    mine[:, :, :here] = torch.stack([values.double(), train.rows[at].double(), train.labels[at].double()])
    everywhere = [torch.empty_like(mine) for _ in range(world.size)]
    dist.all_gather(everywhere, mine)
    similarities, rows, labels = torch.cat(everywhere, dim=2)  # (Q, ranks * k) each
    by_row = rows.argsort(dim=1, stable=True)
    best = by_row.gather(1, similarities.gather(1, by_row).argsort(dim=1, descending=True, stable=True))[:, :k]
    return similarities.gather(1, best), labels.gather(1, best).long()


def greatest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(Q, D), (n, D) -> (Q, min(k, n)) the greatest dot products and their places in the bank, greatest first; of equal
    ones, the first places. The bank is taken in parts of ``BANK``, which bounds the memory."""
    values, places = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0, dtype=torch.int64)
    for begin in range(0, len(bank), BANK):
        top, at = first_greatest(queries @ bank[begin : begin + BANK].T, k)
        values, order = torch.cat([values, top], dim=1).sort(dim=1, descending=True, stable=True)
        places = torch.cat([places, at + begin], dim=1).gather(1, order)[:, :k]
        values = values[:, :k]
    return values, places


def first_greatest(products: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(Q, n) -> (Q, min(k, n)) the greatest of each row and their places, greatest first; of equal ones, the first.

    topk does not say which of equal ones it takes: where that matters, the whole row is sorted.
    """
    k = min(k, products.shape[1])
    values, at = products.topk(k, dim=1)
    tied = (products >= values[:, -1:]).sum(1) > k
    if tied.any():
        whole, places = products[tied].sort(dim=1, descending=True, stable=True)
        values[tied], at[tied] = whole[:, :k], places[:, :k]
    at, order = at.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, at.gather(1, order)
