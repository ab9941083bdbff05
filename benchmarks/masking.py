"""Time of mask plans and of furthest sampling, on one core.

    python benchmarks/masking.py [--json]

Plans are drawn in the data workers, one per sample, so what counts is microseconds per whole plan on one core.
Furthest sampling stands beside the same greedy algorithm in NumPy and, batched over 64 samples, in torch.
"""

import argparse
import json
import timeit
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ummim.masking import MaskConfig, PlanSampler, sample_seed
from ummim.masking.furthest import furthest

BATCH = 64  # samples of the batched torch version

PLANS = [
    ("random 75%", (14, 14), MaskConfig(), 0.0),
    ("random 75%", (14, 14), MaskConfig(), 0.5),
    ("uniform + secondary 25%", (16, 16), MaskConfig("uniform", 0.75, 0.25), 0.0),
    ("uniform + secondary 25%", (16, 16), MaskConfig("uniform", 0.75, 0.25), 0.5),
    ("random 75%", (28, 28), MaskConfig(), 0.0),
    ("random 75%", (28, 28), MaskConfig(), 0.5),
]


def microseconds(function: Callable[[], object]) -> float:
    """The best of five rounds of about a tenth of a second each."""
    timer = timeit.Timer(function)
    function()
    number = max(1, int(0.1 / max(timer.timeit(3) / 3, 1e-9)))
    return min(timer.repeat(5, number)) / number * 1e6


def numpy_furthest(masked: np.ndarray, width: int, keep: int, first: int) -> np.ndarray:
    """The greedy selection in plain NumPy."""
    points = np.stack([masked // width, masked % width], axis=1)
    kept = np.empty(keep, np.int64)
    gap = np.full(len(masked), np.iinfo(np.int64).max)
    current = first
    for k in range(keep):
        kept[k] = masked[current]
        gap = np.minimum(gap, ((points - points[current]) ** 2).sum(1))
        gap[current] = -1
        current = int(gap.argmax())
    return kept


def torch_furthest(masked: Tensor, width: int, keep: int, first: Tensor) -> Tensor:
    """(B, M), first (B,) -> (B, keep): the greedy selection on a batch, as a method would run it on its device."""
    points = torch.stack([masked // width, masked % width], dim=-1)  # (B, M, 2)
    gap = torch.full(masked.shape, torch.iinfo(torch.int64).max)
    sample = torch.arange(len(masked))
    current, kept = first, []
    for _ in range(keep):
        kept.append(masked[sample, current])
        gap = torch.minimum(gap, (points - points[sample, current][:, None]).square().sum(-1))
        gap[sample, current] = -1
        current = gap.argmax(1)
    return torch.stack(kept, dim=1)


def time_plans() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, (h, w), config, throw in PLANS:
        sampler = PlanSampler((h, w), config, throw)
        seed = sample_seed(0, 0, "sample")
        rows.append(
            {
                "plan": name,
                "grid": f"{h}x{w}",
                "throw_ratio": throw,
                "microseconds": microseconds(lambda sampler=sampler, seed=seed: sampler(seed)),  # type: ignore[misc]
            }
        )
    return rows


def time_furthest() -> list[dict[str, object]]:
    """Half of all tokens thrown at mask ratio 75%, so a third of the masked tokens is kept."""
    rows: list[dict[str, object]] = []
    for side in (14, 28):
        sampler = PlanSampler((side, side), MaskConfig(), 0.5)
        samples = [sampler(sample_seed(0, 0, str(i))) for i in range(BATCH)]
        masked = np.stack([np.sort(np.concatenate([sample.kept, sample.thrown])) for sample in samples])
        keep, batch, first = sampler.kept_count, torch.from_numpy(masked), torch.zeros(BATCH, dtype=torch.int64)

        def compiled(masked: np.ndarray = masked, side: int = side, keep: int = keep) -> np.ndarray:
            return furthest(masked[0], side, keep, 0)

        def plain(masked: np.ndarray = masked, side: int = side, keep: int = keep) -> np.ndarray:
            return numpy_furthest(masked[0], side, keep, 0)

        def batched(batch: Tensor = batch, side: int = side, keep: int = keep, first: Tensor = first) -> Tensor:
            return torch_furthest(batch, side, keep, first)

        assert compiled().tolist() == plain().tolist() == batched()[0].tolist()
        rows.append(
            {
                "grid": f"{side}x{side}",
                "masked": masked.shape[1],
                "kept": keep,
                "ummim": microseconds(compiled),
                "numpy": microseconds(plain),
                f"torch_batch_{BATCH}": microseconds(batched) / BATCH,
            }
        )
    return rows


def print_table(title: str, rows: list[dict[str, object]]) -> None:
    print(title)
    cells = [list(rows[0])] + [
        [
            f"{value:.1f}" if isinstance(value, float) and key != "throw_ratio" else str(value)
            for key, value in row.items()
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description="microseconds of mask plans and of furthest sampling, on one core")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    plans, sampling = time_plans(), time_furthest()
    if as_json:
        print(json.dumps({"plans": plans, "furthest": sampling}))
        return
    print_table("The whole plan of one sample, microseconds", plans)
    print_table("Furthest sampling of one sample at r = 50%, microseconds", sampling)


if __name__ == "__main__":
    main()
