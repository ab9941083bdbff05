"""What an index costs at scale: opening it, the memory of a node, the order, and a start in the middle of an epoch.

    python benchmarks/index_scale.py [--samples 100000 1281167 10000000] [--workers 8] [--folder DIR] [--output JSON]

Indices are synthetic: index.json and index.npy as the builder writes them, of shards that are not there. Each figure is
the median over fresh processes. A node is a trainer and its workers, forked as the data loader forks them; together
they read every row of the table once, in the order of an epoch, and then the kernel says what is theirs:

open           ShardIndex.open, seconds
pages          of the table in memory, shared by all processes: the sum of their proportional shares, MB
private        what the trainer's opening and each worker's reading added to its own memory, summed, MB: most of it is
               what Python writes to after a fork, whatever the index
order          most memory that drawing up batches of 4096 takes, all over an epoch, MB
start, middle  from an opened index to the first global batch's rows and keys, at an epoch's start and at steps
               from a fifth to four fifths of it, ms
"""

import argparse
import gc
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ummim.data import DataConfig, ShardIndex
from ummim.data.order import MicroBatches
from ummim.data.shards import FORMAT, INDEX, TABLE, table_dtype

GLOBAL_BATCH = 4096
SHARD = 1000  # samples
EPOCH = 3  # of which the batches are
MB = 1e6


def make_index(folder: Path, samples: int) -> None:
    """Write an index of ``samples`` rows with ImageNet's keys (n01440764/n01440764_10026) to an empty folder."""
    table = np.lib.format.open_memmap(folder / TABLE, "w+", table_dtype(25), (samples,))
    for start in range(0, samples, 100_000):
        rows = np.arange(start, min(start + 100_000, samples))
        part = table[start : start + 100_000]
        part["key"] = [b"n%08d/n%08d_%d" % (row % 1000, row % 1000, row // 1000) for row in rows.tolist()]
        part["shard"], part["offset"] = rows // SHARD, rows % SHARD * 110_592
        part["length"], part["label"] = 110_000, -1
    table.flush()
    counts = [min(SHARD, samples - start) for start in range(0, samples, SHARD)]
    shards = [
        {"name": f"shard-{i:06d}.tar", "bytes": n * 110_592, "sha256": f"{i:064x}", "samples": n}
        for i, n in enumerate(counts)
    ]
    content = {"format": FORMAT, "labelled": False, "source": None, "table_sha256": "0" * 64, "shards": shards}
    (folder / INDEX).write_text(json.dumps(content))


def micro_batches(index: ShardIndex) -> MicroBatches:
    """Whole global batches, in the order of the default recipe."""
    data = DataConfig("")
    return MicroBatches(index, 0, data.streams, data.window, (1, 1, GLOBAL_BATCH), 0, 10**6)


def opening(folder: Path) -> dict[str, float]:
    """Seconds to open the index."""
    began = time.perf_counter()
    ShardIndex.open(folder)
    return {"open": time.perf_counter() - began}


def first_batch(folder: Path, name: str, share: float) -> dict[str, float]:
    """Milliseconds to the first global batch at ``share`` of an epoch, with rows and keys."""
    index = ShardIndex.open(folder)
    steps = len(index) // GLOBAL_BATCH
    began = time.perf_counter()
    picks = micro_batches(index)[EPOCH * steps + int(share * steps)]
    keys = {index.key(pick.row) for pick in picks}
    seconds = time.perf_counter() - began
    assert len(keys) == GLOBAL_BATCH
    return {name: seconds * 1000}


def order_memory(folder: Path) -> dict[str, float]:
    """The most memory, in MB, that the picks of batches all over an epoch take."""
    index = ShardIndex.open(folder)
    steps = len(index) // GLOBAL_BATCH
    tracemalloc.start()
    batches = micro_batches(index)
    for step in range(0, steps, max(steps // 50, 1)):
        batches[EPOCH * steps + step]
    return {"order": tracemalloc.get_traced_memory()[1] / MB}


def node(folder: Path, workers: int) -> dict[str, float]:
    """Memory, in MB, of a trainer and its workers that have read the table of an epoch between them."""
    context = multiprocessing.get_context("fork")
    before = kilobytes("smaps_rollup", "Private_Dirty:")
    index = ShardIndex.open(folder)
    batches = micro_batches(index)
    own = kilobytes("smaps_rollup", "Private_Dirty:") - before
    barrier = context.Barrier(workers + 1)
    ends = [context.Pipe(duplex=False) for _ in range(workers)]
    processes = [
        context.Process(target=read, args=(index, batches, i, workers, barrier, ends[i][1])) for i in range(workers)
    ]
    gc.freeze()  # as the loader does
    for process in processes:
        process.start()
    barrier.wait()  # all have read
    pages, resident = kilobytes("smaps", "Pss:", TABLE), [kilobytes("smaps_rollup", "Rss:")]
    barrier.wait()
    for reader, _ in ends:
        found = reader.recv()
        pages, own = pages + found[0], own + found[1]
        resident.append(found[2])
    for process in processes:
        process.join()
    return {"pages": pages * 1024 / MB, "private": own * 1024 / MB, "largest process": max(resident) * 1024 / MB}


def read(index: ShardIndex, batches: MicroBatches, i: int, workers: int, barrier: Any, end: Connection) -> None:
    """One worker's part of an epoch: every ``workers``-th batch, each row of it."""
    before = kilobytes("smaps_rollup", "Private_Dirty:")
    for step in range(i, batches.steps_per_epoch, workers):
        rows = [pick.row for pick in batches[EPOCH * batches.steps_per_epoch + step]]
        index.table["offset"][rows].sum()
    barrier.wait()
    own = kilobytes("smaps_rollup", "Private_Dirty:") - before
    end.send((kilobytes("smaps", "Pss:", TABLE), own, kilobytes("smaps_rollup", "Rss:")))
    barrier.wait()  # nobody leaves before all are counted


def kilobytes(file: str, field: str, mapping: str | None = None) -> int:
    """A field of /proc/self/smaps or smaps_rollup; of one file's mappings alone, if its name is given."""
    total, counts = 0, mapping is None
    for line in Path("/proc/self", file).read_text().splitlines():
        words = line.split()
        if mapping is not None and not words[0].endswith(":"):
            counts = words[-1].endswith(f"/{mapping}")
        elif counts and words[0] == field:
            total += int(words[1])
    return total


def fresh(functions: Sequence[Callable[[], dict[str, float]]]) -> dict[str, float]:
    """The median of each figure; every function runs in a new process."""
    found = []
    for function in functions:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(function).result())
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def measure(folder: Path, samples: int, workers: int, times: int) -> dict[str, float]:
    """All figures of an index of ``samples`` rows, made in ``folder``."""
    make_index(folder, samples)
    found: dict[str, float] = {"samples": samples, "shards": -(-samples // SHARD)}
    found["table"] = (folder / TABLE).stat().st_size / MB
    inside = [0.2 + 0.6 * (i + 0.5) / times for i in range(times)]
    for functions in (
        [partial(opening, folder)] * times,
        [partial(first_batch, folder, "start", 0.0)] * times,
        [partial(first_batch, folder, "middle", share) for share in inside],
        [partial(order_memory, folder)],
        [partial(node, folder, workers)],
    ):
        found |= fresh(functions)
    return found


def line(each: dict[str, float]) -> str:
    """A row of the table."""
    return (
        f"{each['samples']:>12,} {each['shards']:>7,} {each['table']:>7.0f} MB {each['open']:>7.3f} s "
        f"{each['pages']:>6.0f} MB {each['private']:>5.1f} MB {each['order']:>5.1f} MB "
        f"{each['start']:>6.1f} ms {each['middle']:>6.1f} ms {each['middle'] / each['start']:>6.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What an index costs at scale.")
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000, 1_281_167, 10_000_000])
    parser.add_argument("--workers", type=int, default=8, help="processes beside the trainer (default 8)")
    parser.add_argument("--times", type=int, default=5, help="fresh processes for each time (default 5)")
    parser.add_argument("--folder", type=Path, help="where to make the indices (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    print(
        f"{'samples':>12} {'shards':>7} {'table':>10} {'open':>9} {'pages':>9} {'private':>8} {'order':>8} "
        f"{'start':>9} {'middle':>9} {'ratio':>6}"
    )
    found = []
    for samples in options.samples:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found.append(measure(Path(folder), samples, options.workers, options.times))
        print(line(found[-1]), flush=True)
    if options.output is not None:
        machine = {"python": platform.python_version(), "platform": platform.platform(), "workers": options.workers}
        options.output.write_text(json.dumps({**machine, "figures": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
