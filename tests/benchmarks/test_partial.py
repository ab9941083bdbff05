"""The benchmark of partial reconstruction runs, and the more is thrown the less it counts."""

import json
import subprocess
import sys

from tests.benchmarks.conftest import BENCHMARKS

TINY = [
    "data.image_size=64",
    "method.encoder.embed_dim=32",
    "method.encoder.depth=1",
    "method.encoder.num_heads=2",
    "micro_batch=2",
]


def test_it_measures_every_ratio_that_leaves_a_token(tmp_path):
    output, recipes = tmp_path / "partial.json", ["mae_vit_base_800e", "simmim_vit_base_800e"]
    options = ["--batch", "1", "--rounds", "2", "--device", "cpu", "--output", str(output), "--set", *TINY]
    command = [sys.executable, str(BENCHMARKS / "partial.py"), "--method", *recipes, *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    mae, simmim = json.loads(output.read_text())["results"]
    assert [row["throw_ratio"] for row in mae["rows"]] == [0.0, 0.25, 0.5, 0.65]
    assert [row["throw_ratio"] for row in simmim["rows"]] == [0.0, 0.25, 0.5]  # it masks 60%
    for name, result in zip(recipes, (mae, simmim), strict=True):
        rows = result["rows"]
        assert result["recipe"] == name and name in ended.stdout
        assert rows[0]["seconds_fused"]["ratio_median"] == rows[0]["seconds_fused"]["ratio_of_fastest"] == 1.0
        assert all(len(row["seconds_fused"]["rounds"]) == 2 for row in rows)
        for key in ("forward_flops", "training_flops", "fused_bytes", "materialised_bytes"):
            values = [row[key] for row in rows]
            assert values == sorted(values, reverse=True)
