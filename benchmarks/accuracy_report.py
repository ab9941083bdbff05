"""Summary, tables and figure of the runs of accuracy_study.py, beside the paper's numbers."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from accuracy_rows import GROUPS
from small_study import mean_difference, spread

Run = dict[str, Any]
MEASURES = {  # key of a run: (title, factor, unit)
    "fine_tuned": ("fine-tuned", 100.0, "%"),
    "linear_probe": ("linear probe", 100.0, "%"),
    "nearest_neighbours": ("10-NN", 100.0, "%"),
    "kept_loss": ("held-out loss, kept tokens", 1.0, ""),
    "masked_loss": ("held-out loss, all masked tokens", 1.0, ""),
    "whole_loss": ("held-out loss, all masked tokens, nothing thrown", 1.0, ""),
    "pretraining_seconds": ("seconds of pre-training", 1.0, "s"),
}
REFERENCE = "full"
REFERENCE_OF = {row.name: row.reference for row in GROUPS["all"]}
KINDS = ("plain", "progressive", "furthest", "both")
RATIOS = (25, 50, 65)
SOURCE = "PR-MIM (arXiv 2411.15746), Table 2: top-1 accuracy on ImageNet-1K, fine-tuned; MAE ViT-B/16, 100 epochs"
PUBLISHED = {
    "full": 81.7,
    "r25-plain": 81.4, "r25-progressive": 81.7, "r25-furthest": 81.6, "r25-both": 81.7,
    "r50-plain": 81.1, "r50-progressive": 81.6, "r50-furthest": 81.4, "r50-both": 81.8,
    "r65-plain": 80.3, "r65-progressive": 81.5, "r65-furthest": 80.4, "r65-both": 81.7,
}  # fmt: skip


def effects() -> dict[str, tuple[list[str], list[str]]]:
    """What a component adds, all else equal: name -> the rows with it, and the same rows without it.

    For each ratio and, with less noise, over all ratios.
    """
    pairs = {
        "progressive": (("progressive", "plain"), ("both", "furthest")),
        "furthest": (("furthest", "plain"), ("both", "progressive")),
        "both together": (("both", "plain"),),
    }
    found = {}
    for component, kinds in pairs.items():
        for label, ratios in [(f"r={r}%", (r,)) for r in RATIOS] + [("all r", RATIOS)]:
            with_it = [f"r{ratio}-{kind}" for ratio in ratios for kind, _ in kinds]
            without = [f"r{ratio}-{kind}" for ratio in ratios for _, kind in kinds]
            found[f"{component}, {label}"] = (with_it, without)
    return found


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """For each measure: the spread of each row over its seeds; paired differences to its reference; effects.

    ``interval`` is the half-width of the 95% confidence interval of a mean of differences, which are taken seed by
    seed (Student's t). What lacks a run of some seed goes without that seed.
    """
    summary: dict[str, Any] = {"published": {"source": SOURCE, "top1": PUBLISHED}}
    for key in MEASURES:
        of = {(run["row"], run["seed"]): run[key] for run in runs if key in run}
        rows, seeds = list(dict.fromkeys(row for row, _ in of)), sorted({seed for _, seed in of})
        parts: dict[str, Any] = {"rows": {}, "differences": {}, "effects": {}}
        for row in rows:
            parts["rows"][row] = spread([of[row, seed] for seed in seeds if (row, seed) in of])
            reference = REFERENCE_OF[row]
            paired = [seed for seed in seeds if (row, seed) in of and (reference, seed) in of]
            if paired and row != reference:
                parts["differences"][row] = mean_difference([of[row, s] - of[reference, s] for s in paired])
        for name, (with_it, without) in effects().items():
            paired = [seed for seed in seeds if all((row, seed) in of for row in with_it + without)]
            if paired:
                means = [fmean(of[a, s] - of[b, s] for a, b in zip(with_it, without, strict=True)) for s in paired]
                parts["effects"][name] = mean_difference(means)
        summary[key] = parts
    return summary


def cell(value: dict[str, Any] | None, key: str, width: str, sign: str = "") -> str:
    """``value``'s mean ± its ``width``, in the measure's unit; a difference's in bold if its interval leaves out 0."""
    if value is None:
        return ""
    _, factor, unit = MEASURES[key]
    digits = {"%": 2, "": 4, "s": 0}[unit]
    text = f"{factor * value['mean']:{sign}.{digits}f}"
    if value[width] is not None:
        text += f" ± {factor * value[width]:.{digits}f}"
        if width == "interval" and abs(value["mean"]) > value[width]:
            text = f"**{text}**"
    return text.replace("-", "−")


def table(summary: dict[str, Any], part: str, width: str, sign: str = "") -> list[str]:
    """The lines of a Markdown table: ``part`` of all measures, a column each; columns and rows without a value go."""
    keys = [key for key in MEASURES if summary[key][part]]
    names = list(dict.fromkeys(name for key in keys for name in summary[key][part]))
    titles = [f"{MEASURES[key][0]}, {MEASURES[key][2]}".rstrip(", ") for key in keys]
    lines = [f"| | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(keys)]
    for name in names:
        cells = [cell(summary[key][part].get(name), key, width, sign) for key in keys]
        label = f"{name}, to {REFERENCE_OF[name]}" if part == "differences" else name
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def print_tables(summary: dict[str, Any]) -> None:
    """The rows, their differences to their references, and what each component adds, in Markdown."""
    print("\nMean ± standard deviation over the seeds:\n")
    print("\n".join(table(summary, "rows", "deviation")))
    print("\nDifferences, seed by seed: mean ± half of its 95% interval, bold where that leaves out 0:\n")
    print("\n".join(table(summary, "differences", "interval", "+")))
    if any(summary[key]["effects"] for key in MEASURES):
        print("\nWhat a component adds, likewise:\n")
        print("\n".join(table(summary, "effects", "interval", "+")))
    print(f"\n{SOURCE}:\n{', '.join(f'{row} {top1}' for row, top1 in PUBLISHED.items())}")


def draw(axes: Any, of: dict[str, list[float]], title: str, label: str) -> None:
    """Mean against r for each kind of row, each seed as a dot; full reconstruction and scratch as lines."""
    for kind, colour in zip(KINDS, ("tab:red", "tab:orange", "tab:green", "tab:blue"), strict=True):
        points = [(r, of[f"r{r}-{kind}"]) for r in RATIOS if f"r{r}-{kind}" in of]
        at = [r + KINDS.index(kind) - 1.5 for r, _ in points]
        axes.plot(at, [fmean(values) for _, values in points], "-", color=colour, lw=1.2, label=kind)
        for x, (_, values) in zip(at, points, strict=True):
            axes.plot([x] * len(values), values, ".", color=colour, ms=5)
    for row, style in ((REFERENCE, "-"), ("scratch", ":")):
        if row in of:
            axes.axhline(fmean(of[row]), color="black", lw=0.8, ls=style, label=row)
            axes.plot([0] * len(of[row]), of[row], ".", color="black", ms=5)
    axes.set(title=title, xlabel="thrown tokens, % of all", ylabel=label, xticks=[0, *RATIOS])


def plot(runs: Sequence[Run], path: Path) -> None:
    """Accuracies and the loss with nothing thrown against r, beside the published accuracies."""
    import matplotlib  # only the figure needs it: no dependency of ummim

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    for axes, key in zip(panels, ("fine_tuned", "linear_probe", "whole_loss"), strict=False):
        title, factor, unit = MEASURES[key]
        of: dict[str, list[float]] = {}
        for run in runs:
            if key in run:
                of.setdefault(run["row"], []).append(factor * run[key])
        draw(axes, of, title, "test accuracy (%)" if unit else "loss")
    draw(panels[3], {row: [value] for row, value in PUBLISHED.items()}, "published: ImageNet, ViT-B/16", "top-1 (%)")
    panels[2].set_title("held-out loss, nothing thrown")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
