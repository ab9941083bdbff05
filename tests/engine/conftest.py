"""Start the toy job in processes of its own, alone or on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from ummim.engine import zero

ROOT = Path(__file__).parents[2]


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in zero.RENDEZVOUS}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **extra}


def command(ranks: int, module: str, arguments: Any) -> list[str]:
    """The command that runs a module of this folder: plain python for one rank, torchrun for more."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, "-m", f"tests.engine.{module}", json.dumps(arguments)]


def run(ranks: int, module: str, arguments: Any, **extra: str) -> subprocess.CompletedProcess[str]:
    """One rank is forked, where it needs no environment of its own."""
    if ranks == 1 and not extra:
        return forked.run(["-m", f"tests.engine.{module}", json.dumps(arguments)], ROOT)
    return execute(command(ranks, module, arguments), **extra)


def run_ranks(ranks: int, module: str, arguments: Any) -> list[subprocess.CompletedProcess[str]]:
    """The same on several ranks without a launcher: each one's end."""
    return forked.run_ranks(ranks, ["-m", f"tests.engine.{module}", json.dumps(arguments)], ROOT)


def execute(words: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=environment(**extra), capture_output=True, text=True, timeout=500)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(folder)}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables in this process."""
    for name in zero.RENDEZVOUS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed ZeRO-2 run on two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    jobs = run_ranks(2, "job", {"recipe": {"output": str(folder), "zero_stage": 2, "checkpoint_every": 4}})
    assert all(job.returncode == 0 for job in jobs), jobs
    return folder
