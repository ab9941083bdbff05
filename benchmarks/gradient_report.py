"""Summary, table and figure of gradient_deviation.py's folds."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from small_study import student
from torch import Tensor


class Arm(NamedTuple):
    """A way of throwing tokens."""

    throwing: Literal["random", "furthest"]
    progressive: bool


ARMS = {
    "plain": Arm("random", False),
    "furthest": Arm("furthest", False),
    "progressive": Arm("random", True),
    "PR-MIM": Arm("furthest", True),
}
OTHER_MASKS = "other masks"
SPLIT = ("kept", "thrown")  # the tokens of PR-MIM's plans
PARTS = ("encoder", "decoder")
MEASURES = ("deviation", "cosine", "length")  # of a batch's gradient, in the order of the folds' lists
TABLE = {
    "image_deviation": "deviation, an image",
    "deviation": "a batch",
    "fold_deviation": "a fold",
    "bias": "bias",
    "image_cosine": "cosine, an image",
    "cosine": "a batch",
    "fold_cosine": "a fold",
    "cosine_of_means": "of means",
    "length": "length",
}


def estimate(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and half the width of its 95% interval (Student's t, or the normal one from 7 values on)."""
    n = len(values)
    quantile = student(n) if n < 7 else 1.96
    width = quantile * statistics.stdev(values) / n**0.5 if n > 1 else None
    return {"mean": statistics.fmean(values), "interval": width}


def jackknifed(function: Callable[[list[int]], float], folds: int) -> dict[str, float | None]:
    """``function`` of all folds' numbers, with an interval from leaving out one fold at a time; None if it is not a
    number, which is to say that noise drowns it."""
    everything = list(range(folds))
    value, width = function(everything), None
    if folds > 2:
        without = [function(everything[:i] + everything[i + 1 :]) for i in everything]
        if not any(map(math.isnan, without)):
            width = student(folds) * (statistics.pvariance(without) * (folds - 1)) ** 0.5
    return {"mean": None if math.isnan(value) else value, "interval": width}


def across(a: Tensor, b: Tensor) -> Tensor:
    """(F, F) dot products of folds' vectors (F, n); the diagonal, where noise does not cancel, is 0."""
    return (a @ b.T).fill_diagonal_(0)


def expected(own: Tensor, full: Tensor) -> dict[str, Any]:
    """Bias and cosine of expected gradients from folds' means, (F, n) each."""
    apart, norms, products, lengths = (
        across(own - full, own - full),
        across(full, full),
        across(own, full),
        across(own, own),
    )

    def total(matrix: Tensor, chosen: list[int]) -> float:
        return matrix[chosen][:, chosen].sum().item()

    def bias(chosen: list[int]) -> float:
        norm = total(norms, chosen)
        return math.sqrt(max(0.0, total(apart, chosen)) / norm) if norm > 0 else math.nan

    def cosine(chosen: list[int]) -> float:
        own_norm, norm = total(lengths, chosen), total(norms, chosen)
        return total(products, chosen) / math.sqrt(own_norm * norm) if min(own_norm, norm) > 0 else math.nan

    return {"bias": jackknifed(bias, len(own)), "cosine_of_means": jackknifed(cosine, len(own))}


def summarise(folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean losses by arm, and by part and arm the estimate of every measure."""
    names = list(folds[0]["losses"])
    losses = {name: estimate([loss for fold in folds for loss in fold["losses"][name]]) for name in names}
    parts: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for name in names[1:]:  # all but full reconstruction itself
        for i, part in enumerate(PARTS):
            row: dict[str, Any] = {}
            for prefix, kind in (("", "batches"), ("image_", "images")):
                found = [values[i] for fold in folds for values in fold[kind][name]]
                row |= {prefix + key: estimate([each[j] for each in found]) for j, key in enumerate(MEASURES)}
            own = torch.stack([fold["means"][name].split(fold["sizes"])[i] for fold in folds]).double()  # (F, n)
            references = [fold["references"].get(name, fold["means"]["full"]) for fold in folds]
            full = torch.stack(
                [each.split(fold["sizes"])[i] for each, fold in zip(references, folds, strict=True)]
            ).double()
            row["fold_deviation"] = estimate(((own - full).norm(dim=1) / full.norm(dim=1)).tolist())
            row["fold_cosine"] = estimate(torch.cosine_similarity(own, full).tolist())
            parts[part][name] = row | expected(own, full)
    return {"losses": losses, "gradients": parts}


def print_tables(results: dict[str, Any]) -> None:
    """Every measure of every arm in Markdown, with half the 95% interval of the mean."""
    for step, found in results["after"].items():
        for part, rows in found["gradients"].items():
            print(f"\nAfter {step} steps, loss of full reconstruction {found['losses']['full']['mean']:.3f}\n")
            print(f"| {part}: r, arm | loss | " + " | ".join(TABLE.values()) + " |")
            print("| --- |" + " ---: |" * (1 + len(TABLE)))
            for name, row in rows.items():
                cells = [f"{found['losses'][name]['mean']:.3f}", *(cell(row[key]) for key in TABLE)]
                print(f"| {name} | " + " | ".join(cells) + " |")


def cell(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "noise"
    width = value["interval"]
    return f"{value['mean']:.2f}" + ("" if width is None else f" ± {width:.2f}")


def plot(results: dict[str, Any], path: Path) -> None:
    """At the end of training, the deviation of gradients of 1 image, a batch, a fold and, expected, of all images.

    A column for each ratio; the encoder above, decoder and head below.
    """
    import matplotlib  # only the figure needs it: no dependency of ummim

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = results["settings"]
    rows = list(results["after"].values())[-1]["gradients"]
    counts = ["1", str(settings["batch"]), str(settings["batch"] * settings["batches"]), "∞"]
    keys = ("image_deviation", "deviation", "fold_deviation", "bias")
    colours = {"plain": "tab:red", "furthest": "tab:orange", "progressive": "tab:cyan", "PR-MIM": "tab:blue"}
    ratios = settings["ratios"]
    figure, axes = pyplot.subplots(
        len(PARTS), len(ratios), figsize=(11, 6.4), layout="constrained", sharex=True, sharey="row", squeeze=False
    )
    for line, part in zip(axes, PARTS, strict=True):
        for axis, ratio in zip(line, ratios, strict=True):
            for i, name in enumerate((*ARMS, OTHER_MASKS)):
                row = rows[part][name if name == OTHER_MASKS else f"{ratio:.0%} {name}"]
                points = [
                    (x + 0.06 * (i - 2), row[key]["mean"], row[key]["interval"] or 0.0)
                    for x, key in enumerate(keys)
                    if row[key]["mean"] is not None
                ]
                style = {"color": colours.get(name, "black"), "ls": "-" if name in ARMS else ":", "label": name}
                axis.errorbar(*zip(*points, strict=True), marker="o", ms=4, lw=1, capsize=2, **style)
            axis.set_title(f"{part}, r = {ratio:.0%}")
            axis.set_xticks(range(len(counts)), counts)
            axis.set_ylim(0, 2.5)
        line[0].set_ylabel("deviation from full reconstruction")
    for axis in axes[-1]:
        axis.set_xlabel("images that gradients are averaged over")
    axes[0, 0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
