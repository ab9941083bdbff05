"""What the small pre-training studies share: training, tuning on a few labels, stored parts, spreads."""

import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from fashion_mnist import Data
from probe import accuracy, linear_probe, nearest_neighbours
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import ummim
from ummim.atomic import write_text
from ummim.engine.optim import parameter_groups

CLASSES = 10


@dataclass(frozen=True)
class Pretraining:
    images: int  # the first of the training images
    steps: int
    batch: int
    lr: float = 2e-3
    held_out_images: int = 2000  # the first of the test images, for the reconstruction losses
    curve_every: int = 25  # steps that a point of the training curve averages


@dataclass(frozen=True)
class Tuning:
    labels: int = 2000
    epochs: int = 5
    batch: int = 32
    lr: float = 1e-3
    test_images: int = 5000  # the first of the 10,000


def optimise(
    model: nn.Module, loss_of: Callable[[int], Tensor], steps: int, lr: float, betas: tuple[float, float]
) -> list[float]:
    """Train with AdamW (weight decay 0.05); the loss of each step, before its update.

    ``lr`` is the peak: linear warm-up over a tenth of the steps, then a cosine to 0.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=lr, betas=betas)
    warmup, losses = max(1, steps // 10), []
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, cosine)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def batches(count: int, batch: int, seed: int) -> Callable[[int], tuple[int, Tensor]]:
    """step -> (epoch, (batch,) indices below ``count``): a new order each epoch, the last odd batch dropped."""

    def at(step: int) -> tuple[int, Tensor]:
        epoch, place = divmod(step, count // batch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * seed + epoch))
        return epoch, order[place * batch : (place + 1) * batch]

    return at


def curve_of(losses: Sequence[float], every: int) -> list[float]:
    """Means of ``every`` losses each; the odd ones at the end are left out."""
    return [statistics.fmean(losses[i : i + every]) for i in range(0, len(losses) - every + 1, every)]


class Classifier(nn.Module):
    """An encoder of dense images, its pooled tokens, a LayerNorm and a linear layer: (B, 3, H, W) -> (B, 10) logits.

    ``pool`` takes the encoder's output to (B, D), D being ``encoder.embed_dim``.
    """

    def __init__(self, encoder: nn.Module, pool: Callable[[Tensor], Tensor], dim: int) -> None:
        super().__init__()
        self.encoder, self.pool = encoder, pool
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        return self.pool(self.encoder(images))  # (B, D)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.features(images)))


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], data: Data, images: Tensor) -> Tensor:
    """``function`` of all images, on the host."""
    return torch.cat([function(data.inputs(part)).cpu() for part in images.split(100)])


def fine_tune(model: Classifier, data: Data, sizes: Tuning, chosen: Tensor, seed: int) -> None:
    """Train all weights on the ``chosen`` training images, with random horizontal flips."""
    batch_at = batches(len(chosen), sizes.batch, seed)
    flips = torch.Generator().manual_seed(seed)

    def loss_of(step: int) -> Tensor:
        ids = chosen[batch_at(step)[1]]
        images = data.inputs(data.train_images[ids])
        flip = (torch.rand(len(ids), generator=flips) < 0.5).to(images.device)
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
        return F.cross_entropy(model(images), data.train_labels[ids])

    optimise(model, loss_of, sizes.epochs * (len(chosen) // sizes.batch), sizes.lr, (0.9, 0.999))


def tune(model: Classifier, data: Data, sizes: Tuning, seed: int) -> dict[str, float]:
    """Test accuracies of the frozen encoder's features and of the fine-tuned model, on the seed's labels."""
    chosen = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(seed))[: sizes.labels]
    labels = data.train_labels[chosen].cpu()
    images, truth = data.test_images[: sizes.test_images], data.test_labels[: sizes.test_images].cpu()
    known = in_batches(model.features, data, data.train_images[chosen])  # (labels, D)
    asked = in_batches(model.features, data, images)  # (test, D)
    mean, deviation = known.mean(0), known.std(0) + 1e-6
    known, asked = (known - mean) / deviation, (asked - mean) / deviation
    result = {
        "linear_probe": accuracy(linear_probe(known, labels, asked, CLASSES), truth),
        "nearest_neighbours": accuracy(nearest_neighbours(known, labels, asked, CLASSES), truth),
    }
    fine_tune(model, data, sizes, chosen, seed)
    result["fine_tuned"] = accuracy(in_batches(model, data, images).argmax(1), truth)
    return result


def stored(path: Path, settings: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``path`` holds; else compute it and write it there.

    Raises:
        ValueError: ``path`` holds results of other settings.
    """
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    if path.exists():
        record = json.loads(path.read_text())
        if record["settings"] != settings:
            raise ValueError(f"{path} has other settings: remove it or give another --runs folder")
        return record["result"]
    start = time.perf_counter()
    result = compute()
    result["seconds"] = round(time.perf_counter() - start, 1)
    print(path.stem, {key: value for key, value in result.items() if key != "curve"}, flush=True)
    write_text(path, json.dumps({"settings": settings, "result": result}))
    return result


def provenance() -> dict[str, Any]:
    """The command and the versions that a study ran with."""
    versions = {"ummim": ummim.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return {"command": sys.argv, "versions": versions | {"timm": timm.__version__}}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Values, mean and standard deviation (n - 1); the latter is None for one value."""
    return {
        "values": list(values),
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
    }


def student(n: int) -> float:
    """The 97.5% quantile of Student's t for the mean of ``n`` > 1 values."""
    return float(stats.t.ppf(0.975, n - 1))


def mean_difference(differences: Sequence[float]) -> dict[str, Any]:
    """The spread of paired differences, and the half-width of the 95% interval of their mean (Student's t)."""
    row, n = spread(differences), len(differences)
    row["interval"] = student(n) * row["deviation"] / n**0.5 if n > 1 else None
    return row
