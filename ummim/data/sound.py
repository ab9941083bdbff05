"""Rows of shards that can be read, each in its place or in that of one that cannot."""

from collections.abc import Callable, Container
from itertools import chain
from typing import TypeVar

from ummim.data.faults import Fault, SourceDown, replacements
from ummim.data.order import Pick
from ummim.data.shards import ShardIndex, ShardReader
from ummim.errors import DataError

T = TypeVar("T")


class SoundRows:
    """Reads samples by pick, in one process.

    Args:
        index: the opened shards.
        seed: the run's; it decides which samples replace those that cannot be read.
        bad: rows that count as unreadable without being tried.
        sparse: for few samples of many shards, see ``ShardReader``.
    """

    def __init__(self, index: ShardIndex, seed: int, bad: Container[int] = (), sparse: bool = False) -> None:
        self.index, self.seed, self.bad = index, seed, bad
        self.reader = ShardReader(index, sparse)
        self.gone = False  # nothing could be read: every further sample would wait for it in vain

    def sound(self, pick: Pick, make: Callable[[bytes, Pick], T]) -> tuple[int, T | None, list[Fault]]:
        """The pick's row and what ``make`` makes of its bytes, or those of its first replacement that can be read.

        ``make(bytes, pick)`` raises ``ValueError`` for bytes that are no image. Where nothing can be read the
        result is None: this rank still takes its part in the step to the end, and all ranks stop after it.
        """
        failed: list[tuple[int, str]] = []
        for row in chain([pick.row], replacements(self.seed, pick.epoch, pick.row, len(self.index))):
            if self.gone:
                failed.append((row, "nothing else could be read"))
                break
            try:
                made = self._made(pick._replace(row=row), make)
            except DataError as error:
                failed.append((row, str(error).removeprefix(f"{self.reader.where(row)}: ")))
                if isinstance(error, SourceDown):
                    break
                continue
            return row, made, self._faults(pick.epoch, failed, self.index.key(row))
        self.gone = True
        return pick.row, None, self._faults(pick.epoch, failed, None)

    def _made(self, pick: Pick, make: Callable[[bytes, Pick], T]) -> T:
        if pick.row in self.bad:
            raise DataError("known to be bad")
        data = self.reader.read(pick.row)
        try:
            return make(data, pick)
        except ValueError as error:
            raise DataError(f"the image cannot be decoded: {error}") from None

    def _faults(self, epoch: int, failed: list[tuple[int, str]], replacement: str | None) -> list[Fault]:
        """Rows that were tried for one sample, with what was wrong with each, as faults."""
        places = [self.index.table[row] for row, _ in failed]
        return [
            Fault(
                epoch, row, self.index.shards[place["shard"]].name, self.index.key(row), int(place["offset"]), reason,
                attempt, replacement,
            )
            for attempt, ((row, reason), place) in enumerate(zip(failed, places, strict=True))
        ]  # fmt: skip
