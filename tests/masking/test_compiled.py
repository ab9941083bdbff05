"""Compilation works where nothing can be cached."""

import numpy as np
import pytest
from numba.core.caching import CacheImpl

from ummim.masking.compiled import compiled


def double(values: np.ndarray) -> np.ndarray:
    return 2 * values


def test_compiles_without_a_place_to_cache(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert compiled(double)(np.arange(3)).tolist() == [0, 2, 4]


def test_caches_where_it_can(tmp_path, monkeypatch: pytest.MonkeyPatch):
    function = compiled(double)
    assert function(np.arange(3)).tolist() == [0, 2, 4]
    assert function.stats.cache_path
