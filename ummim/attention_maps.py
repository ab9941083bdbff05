"""Training on masks that follow the encoder's attention (AMT): refresh the maps, and read batches by them in between.

A run's ``attention`` folder has a file for each refresh, named after the epochs done, such as epoch-0040.npy: a
(samples, h, w) float16 array with a row for every row of the index's table. For ImageNet-1K on a 14x14 grid that is
half a gigabyte. They are kept, for a run that goes back to an earlier checkpoint needs that checkpoint's file.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ummim.data import Batch, Loader, ShardIndex, build_loader
from ummim.data.attention import AttentionMaps
from ummim.data.faults import Fault
from ummim.data.normalise import normalise
from ummim.data.order import RowBatches
from ummim.data.prefetch import Prefetcher
from ummim.data.samples import Samples
from ummim.engine.data_faults import describe
from ummim.engine.faults import on_main, raise_together
from ummim.engine.zero import World
from ummim.errors import CheckpointError, DataError
from ummim.masking import AttentionSampler
from ummim.methods.amt import AMT
from ummim.methods.api import Method
from ummim.recipe import Recipe
from ummim.run_plan import RunPlan

FOLDER = "attention"
DTYPE = np.dtype("<f2")

log = logging.getLogger(__name__)


def attention_batches(
    method: Method, index: ShardIndex, recipe: Recipe, plan: RunPlan, world: World, done: int
) -> Iterator[Batch]:
    """This rank's micro-batches from optimizer step ``done`` on, like ``build_loader``'s, with a refresh of all maps
    whenever ``refresh_epochs`` more epochs are done: then every rank computes before it gets its next batch.

    A refresh always computes anew, also where a run goes on from just that step; a run that goes on between two
    refreshes needs the file of the last one.

    Raises:
        CheckpointError: that file is gone, or is of other data.
        DataError: too many images cannot be read.
    """
    config = recipe.method.attention
    assert config is not None and isinstance(method, AMT)
    sampler = AttentionSampler(method.grid, config)
    sampler.warm_up()
    every = config.refresh_epochs * plan.steps_per_epoch
    while done < plan.stop_step:
        begun = done // every * every  # the step of the last refresh; 0: there was none
        maps = None
        if begun:
            path = Path(recipe.output) / FOLDER / f"epoch-{begun // plan.steps_per_epoch:04d}.npy"
            if begun == done:
                refresh(method, index, recipe, plan.micro_batch, world, path)
            on_main(partial(check_maps, path, (len(index), *method.grid)), world)
            maps = AttentionMaps(path, sampler, recipe.data.image_size, config.legacy_crop)
        stop = min(begun + every, plan.stop_step)
        loader = build_loader(
            index, recipe.data, recipe.sampler(), recipe.seed, replace(plan, stop_step=stop), world.rank, world.size,
            done, maps,
        )  # fmt: skip
        loader.pin_memory = world.device.type == "cuda"
        yield from loader
        done = stop


def check_maps(path: Path, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError unless ``path`` holds maps of this shape."""
    try:
        maps = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header makes numpy raise anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(
            f"{path}: {reason}: the masks of these epochs are drawn from it. Restore the file (if the checkpoint is "
            "another run's, copy it from there), or resume from a checkpoint at the end of the epoch in its name"
        ) from None
    if maps.shape != shape or maps.dtype != DTYPE:
        raise CheckpointError(
            f"{path} holds {maps.dtype} of shape {maps.shape}, not {DTYPE} of {shape}: it belongs to other data or "
            "another model; restore this run's file"
        )


@torch.no_grad()
def refresh(method: AMT, index: ShardIndex, recipe: Recipe, batch: int, world: World, path: Path) -> None:
    """Compute the attention map of every image, ``batch`` at a time on each rank, and write them to ``path``.

    Every rank must call it: all make the same number of forward passes, which ZeRO-3 needs, and rank 0 writes what
    they have computed. The file appears when it is whole; one that was there is replaced.
    """
    began = time.monotonic()
    loader = whole_images(index, recipe, batch, world)
    loader.pin_memory = world.device.type == "cuda"
    unfinished = path.with_name(f".{path.name}.partial")
    on_main(lambda: _reserve(unfinished, (len(index), *method.grid)), world)
    table = np.load(unfinished, mmap_mode="r+") if world.is_main else None  # (samples, h, w)
    row, training = 0, method.training
    bad: set[Fault] = set()  # the last row may come several times
    method.eval()
    with closing(iter(loader)) as batches:  # type: ignore[type-var]
        for each in batches:
            bad.update(each.faults)
            maps = method.attention_map(normalise(each.images.to(world.device, non_blocking=True)))  # (B, h, w)
            every = [torch.empty_like(maps) for _ in range(world.size)] if world.is_main else None
            dist.gather(maps, every)
            if every is not None and table is not None:
                table[row : row + world.size * batch] = torch.cat(every)[: len(table) - row].cpu().numpy()
                row += world.size * batch
    method.train(training)
    _check_faults(bad, len(index), recipe, world)
    if table is not None:
        table.flush()
    on_main(lambda: unfinished.replace(path), world)  # the others wait until it is there
    if world.is_main:
        log.warning("%s: attention maps of %d images, in %.0f s", path, len(index), time.monotonic() - began)


def whole_images(index: ShardIndex, recipe: Recipe, batch: int, world: World) -> Loader:
    """This rank's part of all images, whole, in the order of the table; shards behind a URL are fetched ahead."""
    samples = Samples(index, recipe.data, recipe.sampler(), recipe.seed, view="whole")
    rows = RowBatches(index.first, batch, world.rank, world.size)
    ahead = 2 * recipe.data.streams * recipe.data.window  # as in training: the cache has room for them
    prefetcher = partial(Prefetcher, index, rows.upcoming_shards, ahead)
    return Loader(samples, rows, recipe.data.workers, recipe.data.worker_restarts, prefetcher=prefetcher)


def _check_faults(mine: set[Fault], rows: int, recipe: Recipe, world: World) -> None:
    """Tell of the images that could not be read: their maps are of others. Raise DataError if they are too many."""
    everywhere: list[set[Fault]] = [set()] * world.size
    dist.all_gather_object(everywhere, mine)
    bad = sorted({fault.row: fault for faults in everywhere for fault in faults if fault.attempt == 0}.values())
    if not bad:
        return
    text = f"{len(bad)} of {rows} images cannot be read for their attention maps; the first is {describe(bad[0])}"
    if len(bad) > recipe.data.max_bad * rows or any(fault.replacement is None for fault in bad):
        raise_together(DataError(f"{text}. Mend the shards, or raise data.max_bad = {recipe.data.max_bad:g}"), world)
    if world.is_main:
        log.warning("%s; they have the maps of others", text)


def _reserve(path: Path, shape: tuple[int, ...]) -> None:
    """An empty .npy file of this shape. Its space is taken now: a full disk is an error here, and a crash later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.lib.format.open_memmap(path, "w+", DTYPE, shape).flush()
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
