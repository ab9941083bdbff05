"""What lies around thrown tokens: how often a k x k window holds no other token, and how even the throwing is.

    python benchmarks/thrown_context.py [--plans 2000] [--output FILE.json]

Progressive reconstruction fills a thrown token in from the tokens of a k x k window around it that were decoded, the
visible and the kept ones ("context"). For plans of MAE (14x14 tokens, 75% masked, each token by itself), of SimMIM
(60% masked in squares of 2x2 tokens) and of LocalMIM's Swin (28x28 tokens in its finest decoder, 75% masked and thrown
in squares of 4x4), random and furthest throwing: the share of thrown tokens without any context, the least and the
mean number of context tokens, and, for evenness, the distance from a thrown token to the nearest context token and to
the nearest kept one (Euclidean, in tokens: mean, standard deviation, 99th percentile and maximum). Prints Markdown.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import ndimage
from small_study import provenance

from ummim.atomic import write_text
from ummim.masking import MaskConfig, PlanSampler, sample_seed

RATIOS = (0.25, 0.5, 0.65)
KERNELS = (3, 5, 7)
MASKS = {  # the side of the token grid, and the mask
    "MAE": (14, MaskConfig(ratio=0.75)),
    "SimMIM": (14, MaskConfig(ratio=0.6, unit=2)),
    "LocalMIM, Swin": (28, MaskConfig(ratio=0.75, unit=4, throw_unit=4)),  # drawn on 7x7, seen by the finest decoder
}
THROWING: tuple[Literal["random", "furthest"], ...] = ("random", "furthest")


def marked(ids: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(h, w) bool: True at ``ids``."""
    tokens = np.zeros(grid[0] * grid[1], bool)
    tokens[ids] = True
    return tokens.reshape(grid)


def within(tokens: np.ndarray, kernel: int) -> np.ndarray:
    """(h, w) int: how many of the marked ``tokens`` lie in the k x k window around each."""
    return ndimage.correlate(tokens.astype(int), np.ones((kernel, kernel), int), mode="constant")


def distances(values: list[np.ndarray]) -> dict[str, float]:
    everything = np.concatenate(values)
    return {
        "mean": float(everything.mean()),
        "deviation": float(everything.std()),
        "percentile_99": float(np.quantile(everything, 0.99)),
        "maximum": float(everything.max()),
    }


def count(sampler: PlanSampler, plans: int, seed: int = 0) -> dict[str, Any]:
    """Everything about one way of throwing, over ``plans`` plans."""
    found: dict[int, list[np.ndarray]] = {kernel: [] for kernel in KERNELS}  # context tokens in the window
    to_context, to_kept = [], []
    for i in range(plans):
        plan = sampler(sample_seed(seed, 0, str(i)))
        kept, thrown = marked(plan.kept, sampler.grid), marked(plan.thrown, sampler.grid)
        context = marked(plan.visible, sampler.grid) | kept
        for kernel in KERNELS:
            found[kernel].append(within(context, kernel)[thrown])
        to_context.append(ndimage.distance_transform_edt(~context)[thrown])  # to the nearest
        to_kept.append(ndimage.distance_transform_edt(~kept)[thrown])
    windows = {}
    for kernel, numbers in found.items():
        together = np.concatenate(numbers)
        windows[str(kernel)] = {
            "without_context": float((together == 0).mean()),
            "plans_with_such_a_token": float(np.mean([bool((each == 0).any()) for each in numbers])),
            "least": int(together.min()),
            "mean": float(together.mean()),
        }
    return {"windows": windows, "to_context": distances(to_context), "to_kept": distances(to_kept)}


def measure(plans: int) -> list[dict[str, Any]]:
    """A row for each mask, ratio and throwing."""
    rows = []
    for method, (side, mask) in MASKS.items():
        for ratio in RATIOS:
            if ratio >= mask.ratio:
                continue
            for throwing in THROWING:
                values = count(PlanSampler((side, side), replace(mask, throwing=throwing), ratio), plans)
                rows.append({"method": method, "throw_ratio": ratio, "throwing": throwing, **values})
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    """Context by kernel size, then distances."""
    windows = [f"{k}x{k}: {title}" for k in KERNELS for title in ("none", "plans", "least", "mean")]
    spans = [f"to {which}: {title}" for which in ("context", "kept") for title in ("mean", "sd", "99%", "max")]
    lines: dict[str, list[str]] = {"windows": heading(windows), "spans": heading(spans)}
    for row in rows:
        first = [row["method"], f"{row['throw_ratio']:.0%}", row["throwing"]]
        cells = []
        for window in row["windows"].values():
            cells += [f"{window['without_context']:.3%}", f"{window['plans_with_such_a_token']:.1%}"]
            cells += [str(window["least"]), f"{window['mean']:.1f}"]
        lines["windows"].append("| " + " | ".join([*first, *cells]) + " |")
        cells = [f"{value:.2f}" for which in ("to_context", "to_kept") for value in row[which].values()]
        lines["spans"].append("| " + " | ".join([*first, *cells]) + " |")
    return "\n".join([*lines["windows"], "", *lines["spans"]])


def heading(titles: list[str]) -> list[str]:
    return ["| mask | r | throwing | " + " | ".join(titles) + " |", "| --- | ---: | --- |" + " ---: |" * len(titles)]


def main() -> None:
    parser = argparse.ArgumentParser(description="The context of thrown tokens, counted over many mask plans.")
    parser.add_argument("--plans", type=int, default=2000)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the counts as JSON")
    options = parser.parse_args()
    rows = measure(options.plans)
    print(tables(rows))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.output, json.dumps({"plans": options.plans, **provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
