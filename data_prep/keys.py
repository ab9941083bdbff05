"""Keys that come more than once among many, found in a bounded amount of memory."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

_SLICE = 2**25  # keys whose hashes are held at a time: 16 bytes each while they are put together
_CHUNK_BYTES = 2**24  # of keys that are hashed at a time


class Repeated(NamedTuple):
    """A key that comes again: the part and the row in it of both places, ``first`` being the next one before."""

    first: tuple[int, int]
    again: tuple[int, int]


def repeated(parts: Sequence[np.ndarray]) -> list[Repeated]:
    """The places of every key that has come before, in the order of the places.

    64-bit hashes of the keys are sorted, one part of the hashes' range after the other where there are many keys; keys
    whose hash comes twice are then looked up and compared. So all keys are read once for every 33 million of them, and
    nothing is kept of those that come once.

    Args:
        parts: (n,) arrays of bytes (``S`` of any width), such as the key columns of shards, one after the other.
    """
    slices = -(-sum(map(len, parts)) // _SLICE)
    twice = [_twice([hashed[_slice(hashed, slices) == i] for _, _, hashed in _hashes(parts)]) for i in range(slices)]
    last: dict[bytes, tuple[int, int]] = {}
    found = []
    suspects = np.concatenate(twice) if twice else np.empty(0, np.uint64)
    for number, start, hashed in _hashes(parts) if len(suspects) else ():
        for row in (start + np.flatnonzero(np.isin(hashed, suspects))).tolist():
            key = bytes(parts[number][row])
            if key in last:
                found.append(Repeated(last[key], (number, row)))
            last[key] = number, row
    return found


def _hashes(parts: Sequence[np.ndarray]) -> Iterator[tuple[int, int, np.ndarray]]:
    """(part, first row, hashes of some rows) for all rows of all parts, in order."""
    for number, part in enumerate(parts):
        rows = max(_CHUNK_BYTES // max(part.dtype.itemsize, 1), 1)
        for start in range(0, len(part), rows):
            yield number, start, hash_keys(part[start : start + rows])


def _slice(hashed: np.ndarray, slices: int) -> np.ndarray:
    """Which of ``slices`` equal parts of the hashes' range each lies in."""
    return (hashed >> np.uint64(32)) * np.uint64(slices) >> np.uint64(32)


def _twice(pieces: list[np.ndarray]) -> np.ndarray:
    """The values that come more than once in all pieces together. Empties the list."""
    values = np.concatenate(pieces)
    pieces.clear()
    values.sort()
    return np.unique(values[1:][values[1:] == values[:-1]])


def hash_keys(keys: np.ndarray) -> np.ndarray:
    """(n,) bytes -> (n,) uint64; the zeros that numpy fills keys up with do not count."""
    width = -(-keys.dtype.itemsize // 8) * 8
    words = np.ascontiguousarray(keys.astype(f"S{width}")).view("<u8").reshape(len(keys), width // 8)
    total = np.zeros(len(keys), np.uint64)
    for i in range(width // 8):
        word = words[:, i]
        total ^= np.where(word == 0, np.uint64(0), _mixed(word + np.uint64((i + 1) * 0x9E3779B97F4A7C15 % 2**64)))
    return total


def _mixed(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
