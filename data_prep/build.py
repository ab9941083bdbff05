"""``python -m data_prep build``: images in, shards and their index out, killable at any moment.

The images, in their final order, are cut into chunks, a shard each, and worker processes pack the chunks: read, decode,
write a tar. This process gives the tars their names in order and notes each in a journal, so the output does not
depend on the number of workers, and the same command run again goes on after the last note. The index is written
last and the journal removed after it: a folder without an index is no dataset, and one with an index is a whole one.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
from tqdm import tqdm

from data_prep.convert import READER_LIMIT, Conversion
from data_prep.index import write_index
from data_prep.journal import AlreadyBuilt, Bad, Journal, claim
from data_prep.locations import read
from data_prep.occupied import QUARANTINE, SUMMARY
from data_prep.packing import Chunk, Packed, Packer, chunks, convert
from data_prep.pool import ordered
from data_prep.shard_writer import Finished
from data_prep.sources import Item, Reading, Source, open_source, subset
from data_prep.summary import report, summarise
from data_prep.target import Target, open_target
from ummim.atomic import atomic_write
from ummim.data.shards import CLASSES, INDEX, TABLE
from ummim.data.urls import join
from ummim.errors import DataError
from ummim.seeds import sample_seed


@dataclass(frozen=True)
class BuildOptions:
    """What decides the output, besides the images.

    Attributes:
        shard_count: a shard holds this many images of the source, less what is left out of them,
        shard_bytes: or, if given, those up to which it has this many bytes.
        shuffle_seed: of the order of the samples in the shards; None leaves the source's.
        limit: take only this many images, the first ones after shuffling.
        classes: take only these, and number them in this order; None takes all.
        short_side, quality, exif, min_side, max_pixels: see ``Conversion``.
        unlabelled, root, devkit, image_column, label_column: see ``Reading``.
        max_bad: share of unreadable images up to which the build goes on, leaving them out.
    """

    shard_count: int = 1000
    shard_bytes: int | None = None
    shuffle_seed: int | None = 0
    limit: int | None = None
    classes: tuple[str, ...] | None = None
    short_side: int | None = None
    quality: int | None = None
    exif: Literal["keep", "bake", "drop"] = "keep"
    min_side: int = 1
    max_pixels: int = READER_LIMIT
    unlabelled: bool = False
    root: str | None = None
    devkit: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    max_bad: float = 0.01


def build(
    src: str | Path,
    dst: str | Path,
    options: BuildOptions,
    workers: int,
    overwrite: bool = False,
    staging: Path | None = None,
) -> str:
    """Build the shards of ``src`` in ``dst``, each a path or a URL; returns a summary of some lines.

    A finished build is not built again. ``staging``: where shards for a URL are made before they are uploaded.

    Raises:
        DataError: nothing to build from, too many unreadable images, or a ``dst`` that holds something else,
            such as the shards to build from.
        OSError: the disk is full, naming the file; nothing unfinished stays under a final name.
    """
    started = time.monotonic()
    target = open_target(str(dst), staging)
    source, files = _open(str(src), options, workers)
    items = _arrange(source.items, options)
    identity = _identity(items, source, options)
    try:
        with claim(target, identity, overwrite, files) as journal:
            done = _write_shards(target, items, options, workers, journal)
            if not journal.shards:
                raise DataError(f"{src}: none of its {len(items)} images can be read: {_first(journal.bad)}")
            lines = _complete(target, journal, source.classes, identity)
    except AlreadyBuilt as found:
        return _nothing_to_do(target, found.samples)
    seconds = time.monotonic() - started
    return "\n".join([*lines, f"{seconds:.1f} s, {(len(items) - done) / seconds:,.0f} images/s"])


def _open(src: str, options: BuildOptions, workers: int) -> tuple[Source, set[str]]:
    """The images to take, and the files that ``src``'s images are parts of."""
    reading = Reading(**{name: getattr(options, name) for name in Reading.__dataclass_fields__})
    source = open_source(src, reading, workers)
    replaced = [name for name in source.classes or [] if "\ufffd" in name]  # for what is not UTF-8
    if len(set(replaced)) < len(replaced):
        raise DataError(f"{src}: the names of several classes are not UTF-8 and would all be listed as "
                        f"{max(replaced, key=replaced.count)!r}: rename them")  # fmt: skip
    files = {item.path for item in source.items if item.kind != "file"}
    return (source if options.classes is None else subset(source, options.classes)), files


def _nothing_to_do(target: Target, samples: int) -> str:
    try:
        bad = len(read(join(str(target), QUARANTINE)).splitlines())
    except OSError:
        bad = 0
    without = f", {bad:,} image{'s' if bad > 1 else ''} left out then, see {QUARANTINE}" if bad else ""
    return (
        f"already built, nothing to do: {target} ({samples:,} samples{without}); images are known by name, label and "
        f"size alone: if any {'were mended or changed' if bad else 'changed'} otherwise, --overwrite builds anew"
    )


def _arrange(items: list[Item], options: BuildOptions) -> list[Item]:
    """The items in the order of the shards: those of a group stay together, for they are read together."""
    seed = options.shuffle_seed
    if seed is None:
        return items[: options.limit]
    groups = (sample_seed(seed, 0, f"group {item.group}") if item.group >= 0 else 0 for item in items)
    places = (sample_seed(seed, 0, item.key) for item in items)
    first, second = (np.fromiter(values, np.uint64, len(items)) for values in (groups, places))
    return [items[i] for i in np.lexsort((second, first))[: options.limit]]


def _identity(items: list[Item], source: Source, options: BuildOptions) -> str:
    """Hash of everything that decides the output but the pixels: keys, sizes, labels, options."""
    decisive = replace(options, max_bad=0.0, root=None, devkit=None)
    digest = hashlib.sha256(repr((PIL.__version__, decisive, source.classes)).encode())
    for item in items:
        digest.update(f"{item.key!r} {item.label} {item.size}\n".encode())
    return digest.hexdigest()


def _write_shards(target: Target, items: list[Item], options: BuildOptions, workers: int, journal: Journal) -> int:
    """Write the shards that the journal does not have yet; returns how many images were done before."""
    fields = ("short_side", "quality", "exif", "min_side", "max_pixels")
    conversion = Conversion(**{name: getattr(options, name) for name in fields})
    packer = Packer(target.folder, conversion, options.shard_bytes, int(options.max_bad * len(items)))
    todo = list(chunks(items, options.shard_count, options.shard_bytes, conversion))
    journal.take_over(partial(_left_out, todo, conversion))
    done = sum(len(chunk.items) for chunk in todo[: journal.chunks])
    todo = todo[journal.chunks :]
    with (
        tqdm(None, "build", len(items), initial=done, unit=" images", smoothing=0.05, disable=None) as bar,
        closing(ordered(packer, todo, workers, bar)) as packed,
    ):
        for shards, bad in target.uploading(_named(target, packed, journal, len(items), options.max_bad)):
            journal.add(shards, bad)
    return done


def _left_out(
    todo: Sequence[Chunk], conversion: Conversion, number: int, shards: Sequence[Finished], bad: int
) -> list[Bad] | None:
    """The images that are left out of a chunk packed before, tried again; None if it has to be packed anew.

    That is where one can be read now, or where mended images have moved the chunks' borders (see ``chunks``).
    """
    items = todo[number].items if number < len(todo) else []
    stored = {key for entry in shards for key in entry.rows["key"].tolist()}
    out = [item for item in items if item.key.encode() not in stored]
    if len(out) != bad or len(stored) + bad != len(items):
        return None
    found = [result for item in out if isinstance(result := convert(item, conversion), Bad)]
    return found if len(found) == bad else None


def _named(
    target: Target, packed: Iterator[Packed], journal: Journal, total: int, max_bad: float
) -> Iterator[tuple[Packed, list[str]]]:
    """Each chunk and the names that its shards have now."""
    number, bad = len(journal.shards), list(journal.bad)
    for found in packed:
        bad += found.bad
        if len(bad) > int(max_bad * total):
            raise _too_many(target, bad, total, max_bad)
        shards: list[Finished] = []
        for entry in found.shards:
            shard = replace(entry.shard, name=f"shard-{number:06d}.tar")
            (target.folder / entry.shard.name).replace(target.folder / shard.name)
            shards.append(entry._replace(shard=shard))
            number += 1
        yield Packed(shards, found.bad), [entry.shard.name for entry in shards]


def _complete(target: Target, journal: Journal, classes: list[str] | None, identity: str) -> list[str]:
    """Write what lies beside the shards, the index last; returns the lines to print."""
    folder, shards = target.folder, journal.shards
    if classes is not None:
        with atomic_write(folder / CLASSES) as file:
            file.writelines(f"{name}\n".encode() for name in classes)
    _write_quarantine(folder, journal.bad)
    summary = summarise(shards, journal.bad, classes)
    with atomic_write(folder / SUMMARY) as file:
        file.write(json.dumps(summary, indent=1, ensure_ascii=False).encode() + b"\n")
    line = write_index(folder, [entry.shard for entry in shards], [entry.rows for entry in shards], identity)
    for name in (CLASSES, QUARANTINE, SUMMARY, TABLE, INDEX):
        if (folder / name).exists():
            target.publish(name)
    journal.finish()
    return [f"{line.removesuffix(f': {folder}')}: {target}", *report(summary)]


def _too_many(target: Target, bad: list[Bad], total: int, max_bad: float) -> DataError:
    _write_quarantine(target.folder, bad)
    return DataError(
        f"{len(bad)} of {total} images cannot be read, more than --max-bad {max_bad:g}: {_first(bad)}; "
        f"mend or remove them (all so far: {target.folder / QUARANTINE}), or raise --max-bad, and run again"
    )


def _first(bad: Sequence[Bad]) -> str:
    return ", ".join(f"{entry.file} ({entry.reason})" for entry in bad[:3])


def _write_quarantine(folder: Path, bad: Sequence[Bad]) -> None:
    (folder / QUARANTINE).unlink(missing_ok=True)  # of a build that failed
    if bad:
        with atomic_write(folder / QUARANTINE) as file:
            for entry in bad:  # bytes of a name that are not UTF-8 become JSON's own \udcXX
                line = json.dumps(asdict(entry), ensure_ascii=False) + "\n"
                file.write(line.encode(errors="backslashreplace"))
