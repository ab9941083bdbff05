"""What a worker process does in a build: a chunk of the images in, the tars that hold them out."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_prep import pool
from data_prep.convert import Conversion, Stored
from data_prep.journal import Bad
from data_prep.scan import KEY_BYTES
from data_prep.shard_writer import Finished, ShardWriter
from data_prep.sources import Item, read_item
from data_prep.tar import padded
from ummim.atomic import TEMPORARY

_TRIAL = 64  # images that are converted to learn how many bytes the stored ones have


class Chunk(NamedTuple):
    """Images that are packed by one process, into one tar or, where they are larger than foreseen, several."""

    number: int
    items: Sequence[Item]


class Packed(NamedTuple):
    """The tars of a chunk, under temporary names, and the images that were left out."""

    shards: list[Finished]
    bad: list[Bad]


@dataclass(frozen=True)
class Packer:
    """Packs chunks in ``folder``; picklable.

    Attributes:
        folder: where the tars are written.
        conversion: what is stored of an image.
        shard_bytes: a tar is closed once it has this many bytes; None for no such limit.
        tolerated: a chunk with more unreadable images is given up.
    """

    folder: Path
    conversion: Conversion
    shard_bytes: int | None
    tolerated: int

    def __call__(self, chunk: Chunk) -> Packed:
        shards: list[Finished] = []
        bad: list[Bad] = []
        writer: ShardWriter | None = None
        try:
            for item in chunk.items:
                stored = convert(item, self.conversion)
                pool.advance(1)
                if isinstance(stored, Bad):
                    bad.append(stored)
                    if len(bad) > self.tolerated:
                        break
                    continue
                writer = writer or ShardWriter(self.folder / f"chunk-{chunk.number:06d}-{len(shards)}.tar{TEMPORARY}")
                writer.add(item.key, item.label, stored)
                if self.shard_bytes is not None and writer.size >= self.shard_bytes:
                    shards.append(writer.close())
                    writer = None
            if writer:
                shards.append(writer.close())
        except BaseException as error:
            if writer:
                writer.abort(error)
            raise
        return Packed(shards, bad)


def convert(item: Item, conversion: Conversion) -> Stored | Bad:
    """What is stored of an image, or why nothing is."""
    if (long := len(item.key.encode())) > KEY_BYTES:
        return Bad(item.name, f"its key has {long} bytes, more than {KEY_BYTES}: choose shorter names")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about odd tags: what matters is raised
            return conversion(read_item(item))
    except OSError as error:
        return Bad(item.name, error.strerror or str(error))
    except ValueError as error:
        return Bad(item.name, str(error))


def chunks(items: Sequence[Item], count: int, shard_bytes: int | None, conversion: Conversion) -> Iterator[Chunk]:
    """Cut ``items`` into what makes a shard each: ``count`` images, or fewer if these have ``shard_bytes`` already.

    Where bytes are kept and the source tells their number, the cuts are exact. Otherwise the first images are
    converted to learn the mean, and a chunk has as many as fill nine tenths of a shard.
    """
    exact = conversion.keeps_bytes and all(item.kind in ("file", "range") and item.size for item in items)
    if shard_bytes is not None and not exact:
        count, shard_bytes = min(count, _count(items[:_TRIAL], shard_bytes, conversion)), None
    start = total = 0
    number = 0
    for end, item in enumerate(items, 1):
        total += padded(item.size) + (padded(1) if item.label >= 0 else 0)
        if end - start >= count or (shard_bytes is not None and total >= shard_bytes):
            yield Chunk(number, items[start:end])
            start, total, number = end, 0, number + 1
    if start < len(items):
        yield Chunk(number, items[start:])


def _count(trial: Sequence[Item], shard_bytes: int, conversion: Conversion) -> int:
    sizes = [
        padded(len(stored.data)) + (padded(1) if item.label >= 0 else 0)
        for item in trial
        if isinstance(stored := convert(item, conversion), Stored)
    ]
    return max(int(0.9 * shard_bytes * len(sizes) / sum(sizes)), 1) if sizes else 2**31
