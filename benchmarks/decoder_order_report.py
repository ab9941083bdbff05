"""Summary, table and figure of the runs of um_mae_decoder_order.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from small_study import mean_difference, spread

Run = dict[str, Any]
MEASURES = {  # key of a run: (title, factor, unit)
    "held_out_loss": ("held-out loss", 1.0, ""),
    "swapped_loss": ("held-out loss with the positions of the other order", 1.0, ""),
    "fine_tuned": ("fine-tuned", 100.0, "%"),
    "linear_probe": ("linear probe", 100.0, "%"),
    "nearest_neighbours": ("10-NN", 100.0, "%"),
}
PAIRS = (("fixed", "legacy"), ("fixed", "scratch"), ("legacy", "scratch"))


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """For each measure: the spread of each arm over its seeds, and of the paired differences of two arms.

    ``interval`` is the half-width of the 95% confidence interval of a mean difference (Student's t).
    """
    summary: dict[str, Any] = {}
    for key in MEASURES:
        of = {(run["arm"], run["seed"]): run[key] for run in runs if key in run}
        arms = dict.fromkeys(arm for arm, _ in of)
        rows = {arm: spread([value for (a, _), value in of.items() if a == arm]) for arm in arms}
        for one, other in PAIRS:
            seeds = [seed for arm, seed in of if arm == one and (other, seed) in of]
            if seeds:
                rows[f"{one} - {other}"] = mean_difference([of[one, seed] - of[other, seed] for seed in seeds])
        summary[key] = rows
    return summary


def print_table(summary: dict[str, Any]) -> None:
    """Mean and deviation of each arm; mean and 95% half-width, and each seed's value, of paired differences."""
    for key, (title, factor, unit) in MEASURES.items():
        digits = 2 if unit else 4
        print(f"{title} {unit}".rstrip())
        for name, row in summary[key].items():
            width = row.get("interval", row["deviation"])
            mean = f"{factor * row['mean']:+.{digits}f}" if " - " in name else f"{factor * row['mean']:.{digits}f}"
            margin = "" if width is None else f" +- {factor * width:.{digits}f}"
            values = ", ".join(f"{factor * value:.{digits}f}" for value in row["values"])
            print(f"  {name:<17} {mean}{margin}  ({values})")
    print("+-: standard deviation over the seeds; for a difference, half the 95% confidence interval of its mean")


def plot(runs: Sequence[Run], every: int, baseline: float, path: Path) -> None:
    """Training curves of both orders with the loss of a model that knows the position only, their paired
    difference, and fine-tuning accuracy by seed."""
    import matplotlib  # only the figure needs it: no dependency of ummim

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    colours = {"fixed": "tab:blue", "legacy": "tab:orange", "scratch": "tab:grey"}
    curves = {(run["arm"], run["seed"]): run["curve"] for run in runs if "curve" in run}
    for (arm, seed), curve in curves.items():
        steps = [every * (i + 1) for i in range(len(curve))]
        left.plot(steps, curve, color=colours[arm], lw=1, label=arm if seed == 0 else None)
        if arm == "legacy":
            difference = [a - b for a, b in zip(curves["fixed", seed], curve, strict=True)]
            middle.plot(steps, difference, lw=1, label=f"seed {seed}")
    left.axhline(baseline, color="black", lw=0.8, ls=":", label="mean image of the patch")
    left.set(xlabel="step", ylabel="training loss", title="Reconstruction, masked patches")
    middle.axhline(0, color="black", lw=0.8)
    middle.set(xlabel="step", ylabel="fixed - legacy", title="Paired difference of the loss")
    for run in runs:
        right.plot(run["seed"], 100 * run["fine_tuned"], "o", color=colours[run["arm"]])
    right.set(xlabel="seed", ylabel="test accuracy (%)", title="Fine-tuned", xticks=sorted({r["seed"] for r in runs}))
    left.legend()
    middle.legend()
    figure.savefig(path, dpi=120)
