"""``ummim robustness``: a classifier's accuracy on ImageNet's robustness sets, as their authors count it.

A set is cut into the same batches for any number of ranks, which are counted one by one and added up in their order:
each image counts once, and on one kind of device the numbers are equal to the last bit.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ummim.atomic import write_text
from ummim.data.normalise import normalise
from ummim.downstream.evaluate import finite, rank_of_label
from ummim.downstream.imagenet_variants import (
    ALEXNET_ERROR,
    PUBLISHED_IMAGES,
    SEVERITIES,
    ImageSet,
    Views,
    check_set,
    find_corruptions,
    open_set,
    subset_classes,
)
from ummim.engine.faults import on_every_rank, on_main
from ummim.engine.zero import World
from ummim.errors import DataError, UserError, say

T = TypeVar("T")

ALONE = World(0, 0, 1, torch.device("cpu"))  # without a process group
SUBSETS = ("imagenet-a", "imagenet-r")  # of 200 of the 1000 classes
WHOLE = ("val", "imagenet-sketch")
NAMES = {
    "val": "validation",
    "imagenet-a": "ImageNet-A",
    "imagenet-r": "ImageNet-R",
    "imagenet-sketch": "ImageNet-Sketch",
    "imagenet-c": "ImageNet-C",
}


class Counts(NamedTuple):
    """What a model made of labelled images."""

    images: int
    top1: int  # images whose label has the highest logit
    top5: int  # ... one of the five highest
    loss: float  # cross-entropy, summed

    @property
    def error(self) -> float:
        """Share of images whose label has not the highest logit."""
        return 1 - self.top1 / self.images


@dataclass(frozen=True)
class Subject:
    """A classifier under test.

    Attributes:
        model: (B, 3, S, S) normalised -> (B, classes) logits.
        classes: WordNet ids by label.
        image_size: S.
        eval_side: shorter side, in pixels, that images are resized to before their centre is taken.
    """

    model: nn.Module
    classes: Sequence[str]
    image_size: int
    eval_side: int


@dataclass(frozen=True)
class Reading:
    """How images are read.

    Attributes:
        batch: images at once.
        workers: processes that read on each rank; 0: none.
        world: this process among all.
    """

    batch: int = 64
    workers: int = 4
    world: World = ALONE

    def once(self, function: Callable[[], T]) -> T:
        """What ``function`` gives on rank 0, on every rank."""
        return function() if self.world.size == 1 else on_main(function, self.world)

    def together(self, function: Callable[[], T]) -> T:
        """What ``function`` gives on this rank; a user's mistake on any of them ends all."""
        return function() if self.world.size == 1 else on_every_rank(function, self.world)


@torch.inference_mode()
def count(model: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> list[Counts]:
    """Of each batch: uint8 images (B, 3, S, S) and labels (B,), both on the model's device."""
    counts = []
    for pixels, labels in batches:
        logits = model(normalise(pixels)).float()
        before = rank_of_label(logits, labels)  # (B,)
        loss = F.cross_entropy(logits.double(), labels, reduction="sum").item()
        counts.append(Counts(len(labels), int((before < 1).sum()), int((before < 5).sum()), loss))
    return counts


def total(mine: list[Counts], world: World) -> Counts:
    """All ranks' batches, added up in the order of the set, of which rank r of n has every n-th batch from r on."""
    everywhere: list[Any] = [mine]
    if world.size > 1:
        everywhere = [None] * world.size
        dist.all_gather_object(everywhere, [tuple(each) for each in mine])
    in_order = [each for one_of_each in zip_longest(*everywhere) for each in one_of_each if each is not None]
    return Counts(*(sum(column) for column in zip(*in_order, strict=True)))


def count_set(
    subject: Subject, images: ImageSet, reading: Reading, subset: Sequence[str] | None, whole: bool
) -> Counts:
    """Count over a set; on several ranks each takes its part, and must call it.

    Args:
        subject: the classifier.
        images: the set.
        reading: how it is read.
        subset: the classes among which the model chooses, all others' logits being left out; None: all.
        whole: the images are crops already (ImageNet-C): no border is cut off.

    Raises:
        DataError: an image that cannot be read; none is left out.
    """
    device = next(subject.model.parameters()).device
    side = subject.image_size if whole else subject.eval_side
    world, firsts = reading.world, range(0, len(images), reading.batch)
    own = [range(first, min(first + reading.batch, len(images))) for first in firsts[world.rank :: world.size]]
    views = Views(images, subject.image_size, side)
    loader = DataLoader(views, batch_sampler=own, num_workers=reading.workers)  # type: ignore[arg-type]
    compete = set(subject.classes if subset is None else subset)
    columns = [i for i, name in enumerate(subject.classes) if name in compete]
    place = torch.full((len(subject.classes),), -1)
    place[columns] = torch.arange(len(columns))
    chosen = torch.tensor(columns, device=device)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels, faults in loader:
            for fault in filter(None, faults):
                raise DataError(fault)
            yield pixels.to(device), place[labels].to(device)

    return total(reading.together(lambda: count(lambda x: subject.model(x)[:, chosen], batches())), world)


def measure(subject: Subject, places: Mapping[str, Path], reading: Reading) -> dict[str, Any]:
    """The results of each set, by its name; every set's layout is checked before the first is counted.

    Raises:
        UserError: a folder that is not laid out as its set is.
    """
    subject.model.eval()
    sets: dict[str, tuple[ImageSet, list[str] | None]] = {}
    extra: list[str] = []
    for name in (*WHOLE, *SUBSETS):
        if name in places:
            allowed = subset_classes(name) if name in SUBSETS else None
            sets[name] = (reading.once(partial(open_set, places[name], subject.classes, allowed)), allowed)
    corrupted: dict[str, list[Path]] = {}
    if "imagenet-c" in places:
        corrupted, extra = reading.once(lambda: _checked_corruptions(places["imagenet-c"], subject))
    results: dict[str, Any] = {}
    for name, (images, subset) in sets.items():
        _say(f"{NAMES[name]}: {len(images):,} images", reading)
        counts = count_set(subject, images, reading, subset, whole=False)
        results[name] = {"classes": len(set(subject.classes) & set(subset or subject.classes)), **_rates(counts)}
    if corrupted:
        results["imagenet-c"] = _corruptions(subject, corrupted, reading) | {"ignored": extra}
    return results


def _checked_corruptions(place: Path, subject: Subject) -> tuple[dict[str, list[Path]], list[str]]:
    """``find_corruptions``, all of them with the model's classes."""
    corrupted, extra = find_corruptions(place)
    for path in (path for paths in corrupted.values() for path in paths):
        check_set(path, subject.classes)
    return corrupted, extra


def _corruptions(subject: Subject, folders: Mapping[str, Sequence[Path]], reading: Reading) -> dict[str, Any]:
    errors: dict[str, list[float]] = {}
    images = 0
    for name, severities in folders.items():
        _say(f"ImageNet-C: {name}", reading)
        counts = []
        for path in severities:
            own = reading.once(partial(open_set, path, subject.classes))
            counts.append(count_set(subject, own, reading, None, whole=True))
        errors[name] = [each.error for each in counts]
        images += sum(each.images for each in counts)
    return {"images": images, "classes": len(subject.classes), **corruption_errors(errors)}


def corruption_errors(errors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Mean corruption error and what it is made of, in percent, of the top-1 errors (shares) at severities 1 to 5.

    A corruption error is the sum of a corruption's errors over AlexNet's; ``mce`` is the mean of the 15 (AlexNet: 100).
    ``mean_error`` is the mean of the errors themselves. Source: Hendrycks and Dietterich (2019), section 4.1.
    """
    corruptions: dict[str, dict[str, Any]] = {}
    for name, alexnet in ALEXNET_ERROR.items():
        mean = sum(errors[name]) / len(SEVERITIES)
        by_severity = [round(100 * error, 4) for error in errors[name]]
        corruptions[name] = {"error": 100 * mean, "ce": 100 * mean / alexnet, "error_by_severity": by_severity}
    return {
        "mce": sum(each["ce"] for each in corruptions.values()) / len(corruptions),
        "mean_error": sum(each["error"] for each in corruptions.values()) / len(corruptions),
        "corruptions": corruptions,
    }


def _rates(counts: Counts) -> dict[str, Any]:
    """Counts as percentages."""
    return {
        "images": counts.images,
        "top1": 100 * counts.top1 / counts.images,
        "top5": 100 * counts.top5 / counts.images,
        "loss": finite(counts.loss / counts.images),
    }


def table(results: Mapping[str, Any]) -> str:
    """The results as lines of text."""
    lines = [f"{'set':<16}{'images':>11}{'classes':>9}{'top-1':>8}{'top-5':>8}"]
    notes = []
    for name, found in results.items():
        row = f"{NAMES[name]:<16}{found['images']:>11,}{found['classes']:>9,}"
        if found["images"] != PUBLISHED_IMAGES[name]:
            notes.append(f"{NAMES[name]} has {PUBLISHED_IMAGES[name]:,} images as published, here {found['images']:,}")
        if name == "imagenet-c":
            mean = 100 - found["mean_error"]
            lines.append(f"{row}{mean:>8.2f}{'':>8}   mCE {found['mce']:.2f}, mean error {found['mean_error']:.2f}")
            continue
        lines.append(f"{row}{found['top1']:>8.2f}{found['top5']:>8.2f}")
    if "imagenet-c" in results:
        lines += ["", f"{'corruption':<20}{'error':>8}{'CE':>8}   by severity"]
        for name, each in results["imagenet-c"]["corruptions"].items():
            severities = " ".join(f"{error:6.2f}" for error in each["error_by_severity"])
            lines.append(f"{name:<20}{each['error']:>8.2f}{each['ce']:>8.2f}   {severities}")
        if results["imagenet-c"]["ignored"]:
            notes.append(f"no part of ImageNet-C's mean: {', '.join(results['imagenet-c']['ignored'])}")
    return "\n".join(lines + [""] * bool(notes) + [f"note: {note}" for note in notes])


def read_classes_file(path: Path) -> list[str]:
    """The class names of a file, one a line, in label order. Raises UserError."""
    try:
        names = path.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}: must name the classes, each once, one a line in the order of the labels")
    return names


def write_json(path: Path, told: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Write the results, in one step, with what is ``told`` of the model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"model": told, "sets": results}, indent=2) + "\n")


def _say(line: str, reading: Reading) -> None:
    if reading.world.is_main:
        say(line)
