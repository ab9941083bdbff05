"""The rank files of a checkpoint as one table of contents, from which any number of ranks reads what it needs.

A rank's file holds float32 slices of the flattened parameters that it owned: ``master/NAME@START`` (the weights),
``exp_avg/NAME@START`` and ``exp_avg_sq/NAME@START`` (AdamW's moments) or ``momentum_buffer/NAME@START`` (LARS's), and
``average/NAME@START`` (the moving average of the weights, if there is one). Rank 0's also holds ``frozen/NAME`` and
``buffer/NAME`` in full, and in its header the shapes. Nothing here talks to other processes.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ummim.errors import CheckpointError

MASTER, AVERAGE, FROZEN, BUFFER = "master", "average", "frozen", "buffer"
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
FORMAT = "ummim rank file 1"


def rank_file(rank: int, size: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}-of-{size:05d}.safetensors"


def header(step: int, rank: int, size: int, layout: str, **tables: Any) -> dict[str, str]:
    """What a rank file says about itself, so that one of another step, run or place is known for what it is.

    tables: on rank 0 ``shapes``, of the trained parameters by name, and ``aliases``, further names by first name.
    """
    told = {"format": FORMAT, "step": str(step), "rank": str(rank), "world_size": str(size), "layout": layout}
    return {**told, **{name: json.dumps(table) for name, table in tables.items()}}


class Piece(NamedTuple):
    """A slice of a flattened parameter in one file."""

    start: int
    stop: int
    file: Any
    key: str


class Contents:
    """What the rank files of a step folder hold. Files are mapped, not loaded.

    ``shapes``: of the trained parameters, by name. ``full``: the keys that are whole tensors.
    """

    def __init__(self, folder: Path, step: int, layout: str) -> None:
        """Raises CheckpointError if a file is missing, or of another step or model, or if elements are missing."""
        self.folder = folder
        self.full: dict[str, Any] = {}
        self._pieces: dict[tuple[str, str], list[Piece]] = defaultdict(list)
        paths = sorted(folder.glob("rank-[0-9]*-of-[0-9]*.safetensors"))
        if not paths:
            raise CheckpointError(f"{folder}: holds no rank files; use another checkpoint")
        size = int(paths[0].stem.rpartition("-")[2])
        if [path.name for path in paths] != [rank_file(rank, size) for rank in range(size)]:
            raise CheckpointError(f"{folder}: has {len(paths)} of {size} rank files; use another checkpoint")
        for rank, path in enumerate(paths):
            with _reading(path):
                file = safe_open(path, framework="pt")
                told: dict[str, str] = file.metadata() or {}
                if rank == 0:
                    self.shapes: dict[str, list[int]] = json.loads(told["shapes"])
                    self._aliases: dict[str, str] = json.loads(told["aliases"])
                self._list(file)
            expected = header(step, rank, size, layout)
            wrong = [
                f"{name} {told.get(name)}, not {value}" for name, value in expected.items() if told.get(name) != value
            ]
            if wrong:
                raise CheckpointError(f"{path}: is not of this checkpoint ({', '.join(wrong)}); use another checkpoint")
        self._check()

    def _list(self, file: Any) -> None:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            kind, _, rest = key.partition("/")
            if kind in (FROZEN, BUFFER):
                self.full[key] = file
                continue
            name, _, start = rest.rpartition("@")
            (length,) = file.get_slice(key).get_shape()
            self._pieces[kind, name].append(Piece(int(start), int(start) + length, file, key))

    def _check(self) -> None:
        for kind in {MASTER, *self.kinds}:
            for name, shape in self.shapes.items():
                pieces = sorted(self._pieces[kind, name], key=lambda piece: piece[:2])
                bounds = [0, *(bound for piece in pieces for bound in piece[:2]), math.prod(shape)]
                if bounds[::2] != bounds[1::2]:
                    raise CheckpointError(f"{self.folder}: {kind} of {name} is not whole; use another checkpoint")
                self._pieces[kind, name] = pieces

    @property
    def kinds(self) -> set[str]:
        """What there is of each trained parameter, such as ``master``; moments only once the optimizer had stepped."""
        return {kind for kind, _ in self._pieces}

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements ``start`` to ``start + numel`` of a flattened parameter: (numel,) float32."""
        stop = start + numel
        parts = [
            piece.file.get_slice(piece.key)[max(start, piece.start) - piece.start : min(stop, piece.stop) - piece.start]
            for piece in self._pieces[kind, name]
            if piece.start < stop and start < piece.stop
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def whole(self, key: str) -> Tensor:
        """A frozen parameter or a buffer, by one of the keys in ``full``."""
        tensor: Tensor = self.full[key].get_tensor(key)
        return tensor

    def weights(self, kind: str = MASTER) -> dict[str, Tensor]:
        """All weights in float32 and all saved buffers, under the names of ``task.state_dict()``.

        kind: ``average``: the weights' moving average instead.
        """
        state = {}
        for name, shape in self.shapes.items():
            state[name] = self.read(kind, name, 0, math.prod(shape)).view(shape)
        state.update({key.partition("/")[2]: self.whole(key) for key in self.full})
        state.update({alias: state[name].clone() for alias, name in self._aliases.items()})
        return state


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use another checkpoint") from error
