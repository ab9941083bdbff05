"""A run on two hosts that is disturbed again and again is the run that was left alone: the chaos test's short form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]
KINDS = ["rank killed", "loader worker killed", "byte flipped"]


def test_a_disturbed_run_ends_as_an_undisturbed_one(tmp_path: Path):
    """Two starts only: ``python benchmarks/chaos.py`` is the long form, with all kinds of faults."""
    told = tmp_path / "told.json"
    words = ["--steps", "60", "--faults", "3", "--seed", "3", "--checkpoint-every", "4", "--output", str(told)]
    command = [sys.executable, "benchmarks/chaos.py", *words, "--kinds", *KINDS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout)
    result = json.loads(told.read_text())
    assert result["wrong"] == []
    assert result["starts"] == 2
    assert [fault["kind"] for fault in result["faults"]].count("rank killed") == 1
    assert sum("damage" in fault for fault in result["faults"]) == 1
