import random

import numpy as np
import pytest

from data_prep import keys as module
from data_prep.keys import Repeated, hash_keys, repeated


def plainly(parts: list[np.ndarray]) -> list[Repeated]:
    last: dict[bytes, tuple[int, int]] = {}
    found = []
    for number, part in enumerate(parts):
        for row, key in enumerate(part.tolist()):
            if key in last:
                found.append(Repeated(last[key], (number, row)))
            last[key] = number, row
    return found


def drawn(rng: random.Random, count: int, kinds: int) -> np.ndarray:
    width = rng.choice([1, 3, 7, 8, 9, 16, 31])
    return np.array([f"{rng.randrange(kinds)}/{rng.randrange(kinds)}".encode() for _ in range(count)], f"S{width}")


@pytest.mark.parametrize("size", [10, 1000, 10**6])
def test_all_repeated_keys_are_found_whatever_the_parts_and_widths(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLICE", size)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 100)
    rng = random.Random(size)
    for _ in range(20):
        parts = [drawn(rng, rng.choice([0, 1, 5, 40]), rng.choice([2, 30])) for _ in range(rng.randrange(6))]
        assert repeated(parts) == plainly(parts)


def test_keys_of_equal_hash_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "hash_keys", lambda keys: np.zeros(len(keys), np.uint64))
    parts = [np.array([b"a", b"b", b"a"]), np.array([b"c", b"bb", b"b"])]
    assert repeated(parts) == [Repeated((0, 0), (0, 2)), Repeated((0, 1), (1, 2))]


def test_hashes_are_those_of_the_bytes_and_spread() -> None:
    names = [f"n{i // 1300:08d}/img_{i:010d}".encode() for i in range(20_000)]
    wide, table = np.array(names, "S40"), np.zeros(20_000, [("shard", "u1"), ("key", "S24")])
    table["key"] = names
    assert np.array_equal(hash_keys(wide), hash_keys(table["key"]))
    assert len(np.unique(hash_keys(wide))) == 20_000
    assert np.ptp(np.bincount((hash_keys(wide) >> np.uint64(60)).astype(int), minlength=16)) < 300


def test_a_million_keys_take_little_memory() -> None:
    import tracemalloc

    table = np.array([f"{i:020d}".encode() for i in range(10**6)])
    tracemalloc.start()
    try:
        assert repeated([table[:300_000], table[300_000:]]) == []
        assert tracemalloc.get_traced_memory()[1] < 120e6
    finally:
        tracemalloc.stop()
