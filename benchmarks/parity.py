"""How far does a run move when it is cut otherwise? Every ZeRO stage x accumulation x ranks, for tiny models.

``python benchmarks/parity.py [METHOD ...] [--steps 20]``; methods are the names in tests/methods/tiny.py, by default
all. Each method's 24 runs see the same global batches of 16 images, and are compared with that on one rank without
ZeRO and accumulation. Prints a table of the largest relative deviations.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.methods.tiny import METHODS  # noqa: E402
from tests.strategies import Case, Numbers, launch  # noqa: E402

STAGES, RANKS, ACCUMULATIONS = (0, 1, 2, 3), (1, 2, 4), (1, 4)


def cases(method: str, steps: int) -> list[Case]:
    """Every cut of a method; the first is what the others are compared with."""
    return [Case(method, *cut, steps) for cut in itertools.product(STAGES, RANKS, ACCUMULATIONS)]


def deviation(found: list[float], expected: list[float]) -> float:
    """The largest relative one of any step."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def table(runs: Mapping[Case, Numbers], methods: list[str], steps: int) -> str:
    """Markdown, a row a method."""
    lines = ["| method | loss | at | gradient norm | at |", "| --- | ---: | --- | ---: | --- |"]
    for method in methods:
        first, *others = cases(method, steps)
        row = [method]
        for field in ("losses", "norms"):
            found = {case: deviation(getattr(runs[case], field), getattr(runs[first], field)) for case in others}
            worst = max(others, key=lambda case: found[case])  # noqa: B023 (used at once)
            row += [
                f"{found[worst]:.1e}",
                f"ZeRO-{worst.stage}, {worst.ranks} ranks, accumulation {worst.accumulation}",
            ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Parity of ZeRO stages, ranks and accumulation.")
    parser.add_argument("methods", nargs="*", default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    unknown = set(options.methods) - METHODS.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(METHODS)}")
    with tempfile.TemporaryDirectory() as folder:
        wanted = [case for method in options.methods for case in cases(method, options.steps)]
        runs = launch(Path(folder), wanted)
    print(table(runs, options.methods, options.steps))


if __name__ == "__main__":
    main()
