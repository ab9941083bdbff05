"""``python -m data_prep build``: images in, shards and their index out, killable at any moment.

Images are decoded in parallel, in blocks; this process writes them to shards in their order, so the output
does not depend on the number of workers. Every finished shard gets a line in a journal; the same command run
again goes on after the last one. The index is written last and the journal removed after it: a folder without
an index is no dataset, and one with an index is a whole one.
"""

import hashlib
import json
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import PIL
from tqdm import tqdm

from data_prep.convert import Conversion
from data_prep.files import atomic_write
from data_prep.index import write_index
from data_prep.journal import QUARANTINE, Bad, Journal, claim
from data_prep.pool import ordered
from data_prep.scan import scan
from data_prep.shard_writer import ShardWriter
from data_prep.sources import Item, Source, open_source
from ummim.data.shards import CLASSES, JOURNAL, ShardIndex
from ummim.errors import DataError
from ummim.masking import sample_seed

_BLOCK = 16  # images a worker takes at a time


@dataclass(frozen=True)
class BuildOptions:
    """What decides the output, besides the images.

    Attributes:
        shard_count: a shard is closed when it holds this many samples,
        shard_bytes: or, if given, when it has reached this many bytes.
        shuffle_seed: of the order of the samples in the shards; None sorts them by path.
        limit: take only this many images, the first ones after shuffling.
        short_side, quality: see ``Conversion``.
        unlabelled: take all images at any depth, without labels.
        max_bad: share of unreadable images up to which the build goes on, leaving them out.
    """

    shard_count: int = 1000
    shard_bytes: int | None = None
    shuffle_seed: int | None = 0
    limit: int | None = None
    short_side: int | None = None
    quality: int | None = None
    unlabelled: bool = False
    max_bad: float = 0.01


class Prepared(NamedTuple):
    """A sample ready to be written, or (``reason`` not empty) one that could not be read."""

    item: Item
    extension: str
    data: bytes
    reason: str


def build(src: Path, dst: Path, options: BuildOptions, workers: int, overwrite: bool = False) -> str:
    """Build the shards of ``src`` in ``dst``; returns a summary. A finished build is not built again.

    Raises:
        DataError: nothing to build from, too many unreadable images, or a ``dst`` that holds something else.
        OSError: the disk is full, naming the file; nothing unfinished stays under a final name.
    """
    started = time.monotonic()
    source = open_source(src, options.unlabelled)
    items = _arrange(source.items, options)
    identity = _identity(items, source, options)
    if not overwrite and _finished(dst, identity):
        return f"already built, nothing to do: {dst} ({len(ShardIndex.open(dst)):,} samples)"
    with claim(dst, identity, overwrite) as journal:
        done = journal.items_done
        _write_shards(dst, items, options, workers, journal)
        if not journal.shards:
            raise DataError(f"{src}: none of its {len(items)} images can be read: {_first(journal.bad)}")
        if source.classes is not None:
            with atomic_write(dst / CLASSES) as file:
                file.writelines(f"{name}\n".encode() for name in source.classes)
        _write_quarantine(dst, journal.bad)
        paths = [dst / shard.name for shard in journal.shards]
        summary = write_index(dst, journal.shards, list(ordered(scan, paths, workers)), identity)
        journal.finish()
    seconds = time.monotonic() - started
    bad = f", {len(journal.bad)} unreadable images left out ({dst / QUARANTINE})" if journal.bad else ""
    return f"{summary}{bad}; {seconds:.1f} s, {(len(items) - done) / seconds:,.0f} images/s"


def _arrange(items: list[Item], options: BuildOptions) -> list[Item]:
    seed = options.shuffle_seed
    if seed is not None:
        items = sorted(items, key=lambda item: sample_seed(seed, 0, item.key))
    return items[: options.limit]


def _identity(items: list[Item], source: Source, options: BuildOptions) -> str:
    """Hash of everything that decides the output but the pixels: keys, sizes, labels, options."""
    digest = hashlib.sha256(repr((PIL.__version__, replace(options, max_bad=0.0), source.classes)).encode())
    for item in items:
        digest.update(f"{item.key!r} {item.label} {item.size}\n".encode())
    return digest.hexdigest()


def _finished(dst: Path, identity: str) -> bool:
    if (dst / JOURNAL).exists():
        return False
    try:
        index = ShardIndex.open(dst)
        index.check()
    except DataError:
        return False
    return index.source == identity


def _write_shards(dst: Path, items: list[Item], options: BuildOptions, workers: int, journal: Journal) -> None:
    """Write the shards that the journal does not have yet."""
    start = position = journal.items_done
    tolerated = int(options.max_bad * len(items))
    bad: list[Bad] = []  # since the last finished shard
    writer: ShardWriter | None = None
    conversion = Conversion(options.short_side, options.quality)
    with (
        closing(_prepared(items[start:], conversion, workers)) as samples,
        tqdm(samples, "build", len(items), initial=start, unit=" images", disable=None) as bar,
    ):
        try:
            for sample in bar:
                position += 1
                if sample.reason:
                    bad.append(Bad(sample.item.name, sample.reason))
                    if len(journal.bad) + len(bad) > tolerated:
                        raise _too_many(dst, [*journal.bad, *bad], len(items), options.max_bad)
                    continue
                writer = writer or ShardWriter(dst / f"shard-{len(journal.shards):06d}.tar")
                writer.add(sample.item.key, sample.extension, sample.data, sample.item.label)
                full = options.shard_bytes is not None and writer.size >= options.shard_bytes
                if full or writer.samples >= options.shard_count:
                    journal.add(writer.close(), position, bad)
                    writer, bad = None, []
            if writer or bad:
                journal.add(writer.close() if writer else None, position, bad)
        except BaseException as error:
            if writer:
                writer.abort(error)
            raise


def _prepared(items: list[Item], conversion: Conversion, workers: int) -> Generator[Prepared, None, None]:
    blocks = (items[i : i + _BLOCK] for i in range(0, len(items), _BLOCK))
    for block in ordered(partial(_prepare, conversion=conversion), blocks, workers):
        yield from block


def _prepare(items: list[Item], conversion: Conversion) -> list[Prepared]:
    prepared = []
    for item in items:
        try:
            prepared.append(Prepared(item, *conversion(item.read()), ""))
        except OSError as error:
            prepared.append(Prepared(item, "", b"", error.strerror or str(error)))
        except ValueError as error:
            prepared.append(Prepared(item, "", b"", str(error)))
    return prepared


def _too_many(dst: Path, bad: list[Bad], total: int, max_bad: float) -> DataError:
    _write_quarantine(dst, bad)
    return DataError(
        f"{len(bad)} of {total} images cannot be read, more than --max-bad {max_bad:g}: {_first(bad)}; "
        f"mend or remove them (all so far: {dst / QUARANTINE}), or raise --max-bad, and run again"
    )


def _first(bad: list[Bad]) -> str:
    return ", ".join(f"{entry.file} ({entry.reason})" for entry in bad[:3])


def _write_quarantine(dst: Path, bad: list[Bad]) -> None:
    if bad:
        with atomic_write(dst / QUARANTINE) as file:
            file.writelines(json.dumps(asdict(entry), ensure_ascii=False).encode() + b"\n" for entry in bad)
