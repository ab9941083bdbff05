"""benchmarks/index_scale.py on a small index."""

import json
import sys
from pathlib import Path

import pytest

from ummim.data import ShardIndex


def test_it_measures_a_real_index(tmp_path: Path, module, monkeypatch: pytest.MonkeyPatch) -> None:
    index_scale = module("index_scale")
    monkeypatch.setattr(index_scale, "fresh", lambda functions: functions[-1]())  # here, in this process
    command = ["index_scale.py", "--samples", "20000", "--workers", "2", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path / "found.json")])
    index_scale.main()
    (figures,) = json.loads((tmp_path / "found.json").read_text())["figures"]
    assert (figures["samples"], figures["shards"]) == (20000, 20)
    assert 0.5 < figures["pages"] / figures["table"] < 1.5
    assert all(figures[name] > 0 for name in ("open", "order", "start", "middle", "largest process"))


def test_its_index_opens_as_the_builders_does(tmp_path: Path, module) -> None:
    module("index_scale").make_index(tmp_path, 2500)
    index = ShardIndex.open(tmp_path)
    assert index.first.tolist() == [0, 1000, 2000, 2500]
    assert index.key(2345) == "n00000345/n00000345_2"
    assert int(index.table["shard"][2345]) == 2
