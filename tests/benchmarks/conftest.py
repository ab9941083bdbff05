"""What the tests of the small studies share."""

import gzip
import importlib
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture(scope="session")
def fashion(tmp_path_factory):
    """A folder of IDX files with the names and shapes of Fashion-MNIST, but few and random images."""
    folder, rng = tmp_path_factory.mktemp("fashion"), np.random.default_rng(0)
    for part, count in (("train", 80), ("t10k", 40)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", rng.integers(0, 10, count).astype(np.uint8))
    return folder


@pytest.fixture
def module(monkeypatch):
    """import of a benchmark script by its name"""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module
