"""What GreenMIM's grouping costs and saves: host time of a mask, padding, and attention's multiply-adds.

    python benchmarks/grouping.py [--masks 200] [--json]

Swin-B (window 7) and Swin-L (window 14) at 224 pixels, 12 of 49 units visible, stages 1 to 4, plain and shifted
windows. Group sizes are searched (ummim, the paper) or the fullest window's (the official code). Multiply-adds are
those of queries with keys and of attention maps with values, per image and forward; "dense" is Swin on whole images.
"""

import argparse
import json
import statistics
import time

import numpy as np

from ummim.backbones.group_attention import cheapest_groups, pack, unit_cells, unit_groups
from ummim.backbones.table_swin import TableSwinConfig

GRID, UNITS, VISIBLE = (7, 7), 49, 12
MODELS = {"Swin-B w7": TableSwinConfig(), "Swin-L w14": TableSwinConfig(192, num_heads=(6, 12, 24, 48), window_size=14)}


def window_sizes(units: tuple[int, ...], side: int, window: int, shift: int) -> list[int]:
    """Visible tokens of every window that has any."""
    cells = unit_cells(units, GRID, side)
    start = (window - shift) % window
    down, right = ((at + start) // window for at in divmod(cells, GRID[1] * side))
    return np.unique(1000 * down + right, return_counts=True)[1].tolist()


def kinds(config: TableSwinConfig) -> list[tuple[int, int, int, int]]:
    """(stage, window, shift, blocks of this kind)."""
    found = []
    for stage, depth in enumerate(config.depths):
        window, grid = config.window(224, stage), 56 // 2**stage
        if window == grid:
            found.append((stage, window, 0, depth))
        else:
            found += [(stage, window, 0, depth - depth // 2), (stage, window, window // 2, depth // 2)]
    return found


def measure(config: TableSwinConfig, masks: list[tuple[int, ...]]) -> list[dict[str, object]]:
    """One row for each kind of block."""
    rows: list[dict[str, object]] = []
    for stage, window, shift, blocks in kinds(config):
        side, dim = 8 // 2**stage, config.embed_dim * 2**stage
        tokens = VISIBLE * side**2
        shapes, official, milliseconds = [], [], []
        for units in masks:
            unit_groups.cache_clear()
            start = time.perf_counter()
            shapes.append(unit_groups(units, GRID, side, window, shift, False).bias_index.shape[:2])
            milliseconds.append(1e3 * (time.perf_counter() - start))
            sizes = window_sizes(units, side, window, shift)
            official.append(len(pack(sizes, max(sizes))) * max(sizes) ** 2 if tokens > 2 * window**2 else tokens**2)
            groups, size = cheapest_groups(sizes)
            assert tokens <= 2 * window**2 or shapes[-1] == (len(groups), size)
        rows.append(
            {
                "stage": stage + 1,
                "shift": shift,
                "blocks": blocks,
                "groups": statistics.mean(g for g, _ in shapes),
                "size": statistics.mean(n for _, n in shapes),
                "shapes": len(set(shapes)),
                "padding_%": 100 * (statistics.mean(g * n for g, n in shapes) / tokens - 1),
                "host_ms": statistics.mean(milliseconds),
                "MMAC": 2e-6 * dim * blocks * statistics.mean(g * n**2 for g, n in shapes),
                "MMAC_official": 2e-6 * dim * blocks * statistics.mean(official),
                "MMAC_one_group": 2e-6 * dim * blocks * tokens**2,
                "MMAC_dense": 2e-6 * dim * blocks * UNITS * side**2 * window**2,
                "MMAC_linear": 12e-6 * dim**2 * blocks * tokens,
            }
        )
    return rows


def print_table(title: str, rows: list[dict[str, object]]) -> None:
    print(title)
    cells = [list(rows[0])] + [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    total = {key: sum(float(str(row[key])) for row in rows) for key in rows[0] if key.startswith(("host", "MMAC"))}
    print("  all: " + ", ".join(f"{key} {value:.1f}" for key, value in total.items()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="cost of grouping a mask, padding, and attention's multiply-adds")
    parser.add_argument("--masks", type=int, default=200, help="random masks to average over")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    masks = [tuple(sorted(rng.permutation(UNITS)[:VISIBLE].tolist())) for _ in range(arguments.masks)]
    results = {name: measure(config, masks) for name, config in MODELS.items()}
    if arguments.json:
        print(json.dumps(results))
        return
    for name, rows in results.items():
        print_table(f"{name}, {len(masks)} masks", rows)


if __name__ == "__main__":
    main()
