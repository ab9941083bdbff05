"""benchmarks/loader.py at a small size: every way reads every image, and the table stands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.conftest import BENCHMARKS


@pytest.mark.slow
def test_every_way_has_its_line_and_a_missing_loader_its_reason(tmp_path: Path) -> None:
    options = ["--images", "16", "--batch", "8", "--rounds", "1", "--json", str(tmp_path / "times.json")]
    command = [sys.executable, str(BENCHMARKS / "loader.py"), *options, "--others", sys.executable]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200).stdout
    assert "16 JPEGs of 500x375, quality 90" in output
    assert "16 crops and Pillow's: 6" in output  # dB
    assert output.count("masks' share of ummim") == 2
    assert "ffcv is left out: ModuleNotFoundError: No module named 'ffcv'" in output
    times = json.loads((tmp_path / "times.json").read_text())
    assert list(times)[:2] == ["MAE: ImageFolder + PIL", "webdataset + PIL"]
    assert all(processor > 0 for each in times.values() for processor, _ in each)
