"""Seeds of everything that is drawn for a sample."""

import hashlib


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """64-bit seed of a sample, the same on every rank, worker and machine."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
