"""The tables of docs/results.md, and its figure, from what evidence.py has written.

python benchmarks/evidence_report.py docs/results/evidence.json [--plot docs/images/evidence.png]
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evidence import CONTROLS, METHODS
from small_study import mean_difference, spread

NAMES = {"mae": "MAE", "pr_mae": "MAE, PR-MIM at r = 50%", "simmim": "SimMIM", "um_mae": "UM-MAE",
         "green_mim": "GreenMIM", "local_mim": "LocalMIM", "mff": "MFF", "tec": "TEC", "amt": "AMT on MAE"}  # fmt: skip
ENCODERS = {"vit": "ViT", "relative_vit": "SimMIM's ViT", "um_swin": "UM-MAE's Swin", "swin": "Swin"}
ENCODER = dict.fromkeys(METHODS, "vit") | {row: kind for kind, row in CONTROLS.items()}
MEASURES = {"fine_tuned": "fine-tuned", "linear": "linear probe"}

Values = Mapping[str, Mapping[int, Mapping[str, float]]]  # row -> seed -> result


def main() -> None:
    parser = argparse.ArgumentParser(description="the tables of the evidence study")
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path, help="draw the figure there (needs matplotlib)")
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    by_set: dict[str, dict[str, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    for result in results["rows"]:
        by_set[result["set"]][result["row"]][result["seed"]] = result
    for name, values in by_set.items():
        print(f"\n{name}\n\n{table(values)}\n")
        beside = [f"{measure} {gain(values['pr_mae'], values['mae'], key)}" for key, measure in MEASURES.items()]
        print(f"{NAMES['pr_mae']}, beside MAE: {', '.join(beside)}")
    if args.plot:
        plot(by_set, args.plot)


def table(values: Values) -> str:
    """A Markdown table of one set: means and deviations over the seeds, and differences to the own control."""
    lines = [
        "| | encoder | TFLOPs | fine-tuned, % | to its control, points | linear probe, % | to its control, points |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in CONTROLS:
        cells = [f"{text(values[kind], key)} |" for key in MEASURES]
        lines.append(f"| from scratch | {ENCODERS[kind]} | | {cells[0]} | {cells[1]} |")
    for row in METHODS:
        mine, control = values[row], values[ENCODER[row]]
        flops = spread([result["flops"] for result in mine.values()])["mean"] / 1e12
        cells = [f"{text(mine, key)} | {gain(mine, control, key)} |" for key in MEASURES]
        lines.append(f"| {NAMES[row]} | {ENCODERS[ENCODER[row]]} | {flops:.2f} | {' '.join(cells)}")
    return "\n".join(lines)


def text(results: Mapping[int, Mapping[str, float]], key: str) -> str:
    """Mean ± standard deviation."""
    found = spread([result[key] for result in results.values()])
    return f"{found['mean']:.1f}" + ("" if found["deviation"] is None else f" ± {found['deviation']:.1f}")


def gain(mine: Mapping[int, Mapping[str, float]], control: Mapping[int, Mapping[str, float]], key: str) -> str:
    """Mean difference, seed by seed, ± its 95% interval; bold where that does not hold 0."""
    found = mean_difference([result[key] - control[seed][key] for seed, result in mine.items()])
    if found["interval"] is None:
        return f"{found['mean']:+.1f}"
    shown = f"{found['mean']:+.1f} ± {found['interval']:.1f}"
    return f"**{shown}**" if abs(found["mean"]) > found["interval"] else shown


def plot(by_set: Mapping[str, Values], path: Path) -> None:
    """A panel for each set and measure: a bar for each method's mean, dots for its seeds, a line for its control."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(by_set), 2, figsize=(11, 3.4 * len(by_set)), squeeze=False)
    for panels, (name, values) in zip(axes, by_set.items(), strict=True):
        for axis, (key, measure) in zip(panels, MEASURES.items(), strict=True):
            for place, row in enumerate(METHODS):
                seen = [result[key] for result in values[row].values()]
                axis.bar(place, sum(seen) / len(seen), color="#9ecae1", width=0.7)
                axis.plot([place] * len(seen), seen, "o", color="#08519c", markersize=3)
                base = spread([result[key] for result in values[ENCODER[row]].values()])["mean"]
                axis.plot([place - 0.45, place + 0.45], [base, base], color="#d62728")
            axis.set_xticks(range(len(METHODS)), [NAMES[row] for row in METHODS], rotation=35, ha="right", fontsize=8)
            axis.set_title(f"{name}: {measure}, % (red: the same encoder from scratch)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
