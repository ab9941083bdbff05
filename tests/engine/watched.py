"""A rank without torch, under the watchdog: ``watched.py '{"rank": 0, "folder": ..., "fault": ...}'``.

In each step the ranks read, compute and wait for each other. fault, at step 4 of its rank: ``sleep`` while reading,
``gil`` (C code that never lets another thread run), ``error``, ``refuse`` (a user's mistake), ``wait`` (in a call
that looks like a collective). A rank that sees another one's process gone fails as gloo does.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ummim.engine import watchdog as rank_side
from ummim.engine.watchdog import AGREE, FORWARD, READ, Watchdog
from ummim.errors import UserError, run_main

STEP = 4  # of the fault
stops: list[int] = []


class Peers:
    """Two or more processes that meet through files."""

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.folder, self.rank, self.size = folder, rank, size
        (folder / f"pid-{rank}").write_text(str(os.getpid()))

    def share(self, value: list[Any]) -> list[Any]:
        path = self.folder / "address"
        if self.rank == 0:
            path.with_suffix(".new").write_text(json.dumps(value))
            path.with_suffix(".new").rename(path)
        while not path.exists():
            time.sleep(0.01)
        return json.loads(path.read_text())

    def agree(self, step: int, stop: int) -> int:
        """The exit code that any rank asks for."""
        paths = [self.folder / f"step-{step}-{rank}" for rank in range(self.size)]
        mine = paths[self.rank].with_suffix(".new")
        mine.write_text(str(stop))
        mine.rename(paths[self.rank])
        for rank, path in enumerate(paths):
            while not path.exists():
                if (self.folder / f"pid-{rank}").exists() and not self._alive(rank):
                    raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer\nand more")
                time.sleep(0.01)
        return max(int(path.read_text()) for path in paths)

    def _alive(self, rank: int) -> bool:
        stat = Path("/proc", (self.folder / f"pid-{rank}").read_text(), "stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def suffer(fault: str, folder: Path) -> None:
    if fault == "sleep":
        time.sleep(3600)
    elif fault == "gil":
        while True:  # a signal ends the sleep
            ctypes.PyDLL(None).sleep(3600)
    elif fault == "error":
        raise KeyError("blocks.0.weight")
    elif fault == "refuse":
        raise UserError("shards: they are gone")
    elif fault == "wait":
        path = folder / "torch/distributed/c10d.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        exec(compile("import time\ndef all_reduce(): time.sleep(3600)\nall_reduce()", str(path), "exec"))


def main() -> int:
    options = json.loads(sys.argv[1])
    folder, rank, size = Path(options["folder"]), options["rank"], options["size"]
    peers = Peers(folder, rank, size)
    rank_side._share = peers.share
    data = SimpleNamespace(shards="shards", retry_seconds=0)
    recipe: Any = SimpleNamespace(hang_seconds=options["hang_seconds"], compile=False, data=data, output=str(folder))
    world: Any = SimpleNamespace(rank=rank, local_rank=options["local_rank"], size=size, is_main=rank == 0)
    signal.signal(signal.SIGTERM, lambda number, frame: stops.append(143))
    with Watchdog(recipe, world, options["silent"]) as watchdog:
        for step in range(1, options["steps"] + 1):
            watchdog.beat(step, READ)
            if step == STEP and options.get("fault"):
                (folder / f"faulty-{rank}").touch()
                suffer(options["fault"], folder)
            time.sleep(0.02)
            watchdog.beat(step, FORWARD)
            watchdog.beat(step, AGREE)
            if stop := peers.agree(step, max(stops, default=0)):
                return stop
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
