"""The order of an epoch written out in full, as the plain reference of ``ummim.data.order``."""

import numpy as np

from ummim.data.order import _hash
from ummim.masking import sample_seed


def plain_order(first: np.ndarray, seed: int, epoch: int, streams: int, window: int) -> np.ndarray:
    """(samples,) int64: the rows of the table in the order of ``epoch``."""
    count = len(first) - 1
    shards = np.argsort(_hash(sample_seed(seed, epoch, "order of shards"), np.arange(count)), kind="stable")
    ticket = _hash(sample_seed(seed, epoch, "order of samples"), np.arange(first[-1]))  # (samples,)

    dealt = [shards[s::streams] for s in range(min(streams, count))]
    sizes = np.array([int((first[own + 1] - first[own]).sum()) for own in dealt])
    lanes = np.full((int(sizes.max(initial=0)), len(dealt)), -1, np.int64)  # a column per stream, -1 when dry
    for s, own in enumerate(dealt):
        rows = [_shuffled(first, own[w : w + window], ticket) for w in range(0, len(own), window)]
        lanes[: sizes[s], s] = np.concatenate(rows)
    turns = lanes.ravel()
    return turns[turns >= 0]


def _shuffled(first: np.ndarray, shards: np.ndarray, ticket: np.ndarray) -> np.ndarray:
    rows = np.concatenate([np.arange(first[s], first[s + 1]) for s in shards])
    return rows[np.argsort(ticket[rows], kind="stable")]
