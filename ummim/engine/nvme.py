"""Optimizer state on a local disk: DeepSpeed's swap files, what they take, and what is in them.

ZeRO-3 brings the state of one sub-group of weights after another into memory for its optimizer step: float32 master
weights, moments, gradients. In between they are in files that live as long as the run. A sub-group of less than
``aio.block_size`` on this rank stays in memory. Checked with deepspeed 0.19.8.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import fcntl
import hashlib
import io
import mmap
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from ummim.engine.faults import on_every_rank
from ummim.errors import RecipeError, UserError

if TYPE_CHECKING:
    from ummim.engine.zero import World

GIB = 2**30
BUFFERS = 4  # for a sub-group's master weights, moments and gradients, and again for each direction that is pipelined
PACKAGES = "its headers (libaio-dev, libaio-devel), g++ and ninja are needed"


@dataclass(frozen=True)
class SwapBytes:
    """What one rank's optimizer state takes.

    Attributes:
        files: bytes on the disk.
        kept: bytes of the sub-groups that are too small for it.
        locked: bytes of page-locked host memory through which the files pass.
    """

    files: int
    kept: int
    locked: int


@dataclass(frozen=True)
class Swapping:
    """What a DeepSpeed configuration says about it; sizes in elements.

    Attributes:
        sub_group: that a sub-group's share is closed at.
        least: bytes from which on anything is swapped out.
        aligned: elements that a file is a multiple of.
        buffers: of the largest sub-group's size.
    """

    sub_group: int
    least: int
    aligned: int
    buffers: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Swapping | None:
        """None where the optimizer state does not lie on a disk."""
        zero, aio = config["zero_optimization"], config.get("aio") or {}
        section = zero.get("offload_optimizer") or {}
        if section.get("device") != "nvme":
            return None
        return cls(
            sub_group=int(zero.get("sub_group_size", 1e9)),
            least=max(2**20, int(aio.get("block_size", 2**20))),
            aligned=256 * int(aio.get("intra_op_parallelism", 1)),
            buffers=int(section.get("buffer_count", BUFFERS)),
        )

    def sub_groups(self, shares: Sequence[int]) -> list[list[int]]:
        """An optimizer group's parameters, of so many elements on this rank, as DeepSpeed cuts it up."""
        if self.sub_group >= sum(shares):
            return [list(shares)]
        found: list[list[int]] = [[]]
        for share in shares:
            if sum(found[-1]) >= self.sub_group:
                found.append([])
            found[-1].append(share)
        return found

    def bytes(self, groups: Iterable[Sequence[int]]) -> SwapBytes:
        """Of optimizer groups of parameters of so many elements on this rank, with AdamW."""
        files = kept = largest = 0
        for sub_group in (sub_group for shares in groups for sub_group in self.sub_groups(shares)):
            numel = sum(sub_group)
            aligned = -(-numel // self.aligned) * self.aligned
            largest = max(largest, aligned)
            if 4 * numel < self.least:
                kept += 16 * numel
                continue
            swapped = [share // self.aligned * self.aligned for share in sub_group if 4 * share >= self.least]
            files += 12 * aligned + 4 * sum(swapped)
            kept += 4 * (numel - sum(swapped))
        return SwapBytes(files, kept, 4 * largest * self.buffers)


def check_offload(zero: dict[str, Any], path: Path, output: str) -> None:
    """Check a configuration's ``zero_optimization``, read from ``path``, for a run that writes to ``output``.

    Puts the run's own folder in the place of ``nvme_path``. Raises RecipeError for what cannot be trained.
    """
    for section, least in (("offload_optimizer", 1), ("offload_param", 3)):
        given = zero.get(section) or {}
        device = given.get("device", "none")
        if device == "nvme" and section == "offload_optimizer":
            least = 3  # at stages 1 and 2 DeepSpeed takes it for cpu, silently
            given["nvme_path"] = _own_folder(str(given.get("nvme_path", "")), output, path)
            wanted = BUFFERS * (1 + bool(given.get("pipeline_read")) + bool(given.get("pipeline_write")))
            if given.setdefault("buffer_count", wanted) < wanted:
                raise RecipeError(f"ds_config: {path} sets buffer_count={given['buffer_count']}: {wanted} are needed")
        elif device not in ("none", "cpu"):
            raise RecipeError(f"ds_config: {path} sets {section}.device={device}: ummim cannot train that; use cpu")
        if device != "none" and zero["stage"] < least:
            raise RecipeError(f"ds_config: {path} sets {section}: that takes zero_stage={least} or more; remove it")


def _own_folder(given: str, output: str, path: Path) -> str:
    """That of a run's swap files below ``given``, in which variables of the environment are replaced."""
    folder, run = Path(os.path.expandvars(given)), Path(output).resolve()
    if not folder.is_absolute():
        raise RecipeError(
            f"ds_config: {path} sets nvme_path={given}: give the absolute path of a folder on a local disk, or set "
            "the variable in it"
        )
    if folder.resolve().is_relative_to(run / "checkpoints"):
        raise RecipeError(f"ds_config: {path} sets nvme_path={given}: checkpoints are there; name another folder")
    return str(folder / f"ummim-{hashlib.sha256(str(run).encode()).hexdigest()[:16]}")


def prepare(
    config: dict[str, Any], groups: Sequence[Sequence[Tensor]], world: World, load_operator: Callable[[], None]
) -> None:
    """Load DeepSpeed's operator, and see that there is room; nothing where no state lies on a disk.

    groups: the optimizer's parameters. ``load_operator``: ``build`` of it. Every rank must call it. Raises UserError,
    on one of them.
    """
    swapping = Swapping.of(config)
    if swapping is None:
        return
    folder = Path(config["zero_optimization"]["offload_optimizer"]["nvme_path"])
    on_every_rank(load_operator, world)
    on_every_rank(lambda: _make(folder) if world.local_rank == 0 else None, world)
    _made.append(folder)
    atexit.register(remove_folders)
    hosts: list[str] = [""] * world.size
    torch.distributed.all_gather_object(hosts, socket.gethostname())
    needed = swapping.bytes([-(-p.numel() // world.size) for p in group] for group in groups)
    on_every_rank(lambda: _check_room(folder, needed, hosts.count(socket.gethostname())), world)


def operator_folder() -> Path:
    """Where DeepSpeed's operator is built."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    return root / f"ummim-torch{torch.__version__}-python{sys.version_info.major}.{sys.version_info.minor}"


def build(load_operator: Callable[[], None]) -> None:
    """One process of a host after another, in a folder of ummim's own: a lock that a killed build left there is known
    for what it is, and torch would wait for it for ever. Raises UserError."""
    folder = operator_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "ummim.lock").open("w") as lock, mock.patch.dict(os.environ, TORCH_EXTENSIONS_DIR=str(folder)):
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in folder.glob("*/lock"):
            stale.unlink()
        try:
            with redirect_stdout(io.StringIO()):
                load_operator()
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"offload_optimizer.device=nvme: DeepSpeed's async_io cannot be built on {socket.gethostname()} "
                f"({str(error).strip().splitlines()[0]}): {PACKAGES}"
            ) from error


_made: list[Path] = []  # folders of this process's swap files


def _make(folder: Path) -> None:
    """Anew: an earlier start that was killed may have left files."""
    shutil.rmtree(folder, ignore_errors=True)
    probe = folder / "probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600))
        probe.unlink()
    except OSError as error:
        why = "no direct I/O on this file system" if error.errno == errno.EINVAL else error.strerror
        raise UserError(
            f"offload_optimizer.nvme_path: {folder} on {socket.gethostname()} cannot be used: {why}; "
            "name a folder on a local disk"
        ) from error


def _check_room(folder: Path, needed: SwapBytes, ranks: int) -> None:
    free, host = shutil.disk_usage(folder).free, socket.gethostname()
    if free < needed.files * ranks:
        raise UserError(
            f"offload_optimizer.nvme_path: {folder} on {host} has {free / GIB:.2f} GiB free, the optimizer states of "
            f"{ranks} ranks take {needed.files * ranks / GIB:.2f}: free some space or name another folder"
        )
    if not _locks(needed.locked):  # DeepSpeed would abort
        raise UserError(
            f"offload_optimizer: {host} does not let this process lock {needed.locked / GIB:.2f} GiB of memory, which "
            "the swap files pass through: raise `ulimit -l`, or lower sub_group_size in the ds_config"
        )


def _locks(length: int) -> bool:
    """Whether this process may lock so many bytes of memory; touches none."""
    libc, on_fault = ctypes.CDLL(None), 1
    try:
        memory = mmap.mmap(-1, length)
    except OSError:
        return False
    with memory:
        start = (ctypes.c_char * 1).from_buffer(memory)
        refused = libc.mlock2(ctypes.byref(start), ctypes.c_size_t(length), on_fault)
        del start  # else it could not be closed, which unlocks it
    return not refused


def remove_folders() -> None:
    """Remove this process's swap files, and the folder with them once no other rank of the host has any. So it is at
    the end of a run and of a process; what ``kill -9`` leaves, the run's next start removes."""
    for folder in _made:
        base = folder / "zero_stage_3" / "optimizer"
        shutil.rmtree(base / f"rank{os.environ.get('RANK', 0)}", ignore_errors=True)
        for parent in (base, base.parent, folder):
            with suppress(OSError):
                parent.rmdir()
    _made.clear()


def on_disk(swapper: Any, flat: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors``, an optimizer's state of ``flat``, to be read: (numel,) float32, mapped from their files where
    DeepSpeed's ``swapper`` has swapped them out. Good until the next optimizer step."""
    info = swapper.swap_params_info.get(flat.ds_id)  # type: ignore[attr-defined]
    if info is None:
        return tensors
    paths = {id(context.compute_tensor): context.swap_path for context in info.tensors}
    return {
        kind: torch.from_file(paths[id(tensor)], shared=False, size=info.numel(), dtype=torch.float32)
        if id(tensor) in paths
        else tensor
        for kind, tensor in tensors.items()
    }
