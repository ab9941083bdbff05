"""Samples that cannot be read or decoded, and the rule by which others take their places."""

from collections.abc import Iterator
from typing import NamedTuple

from ummim.errors import DataError
from ummim.seeds import sample_seed

ATTEMPTS = 16  # replacements that are tried for a sample; if all fail, the source of the data is gone


class Fault(NamedTuple):
    """A sample that could not be read or decoded, and what was read in its place."""

    epoch: int
    row: int  # of the index's table
    shard: str
    key: str
    byte: int  # where the image begins in the shard
    reason: str
    attempt: int  # 0: the sample itself; n: the n-th that was tried in the place of one
    replacement: str | None  # the key of the sample read instead; None: nothing could be read


class SourceDown(DataError):
    """The place that the shards come from does not answer at all: no fault of one sample, and others fare no better."""


def replacements(seed: int, epoch: int, row: int, rows: int) -> Iterator[int]:
    """Other rows to read, one after the other until one is sound, in place of ``row`` of a table of ``rows``.

    A pure function of its arguments: the same whatever rank and worker reads the sample.
    """
    for attempt in range(ATTEMPTS if rows > 1 else 0):
        other = sample_seed(seed, epoch, f"replacement {attempt} of row {row}") % (rows - 1)
        yield other + (other >= row)
