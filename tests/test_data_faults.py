"""Bad data in a real run: replaced and told up to the budget, then one message on all ranks; dead workers replaced."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main as data_prep
from tests import forked
from tests.conftest import ROOT, TINY_MAE
from ummim.data import ShardIndex

BAD = 13  # row
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """26 small pictures in four shards; one, which the figures would show, does not decode."""
    source, out = tmp_path / "pictures", tmp_path / "shards"
    source.mkdir()
    rng = np.random.default_rng(0)
    for i in range(26):
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        small.resize((72, 72), Image.Resampling.BICUBIC).save(source / f"{i:02d}.jpg")
    assert data_prep(["build", str(source), str(out), "--shard-count", "7"]) == 0
    overwrite(out, BAD)
    return out


def overwrite(shards: Path, row: int) -> None:
    index = ShardIndex.open(shards)
    with (shards / index.shards[index.table["shard"][row]].name).open("r+b") as file:
        file.seek(int(index.table["offset"][row]))
        file.write(b"\0" * 64)


def run(*command: Any) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


def forks(pid: int) -> list[int]:
    """The children of a process that run its own program, as its data workers do and its guardian does not."""

    def command(process: int | str) -> bytes:
        return Path(f"/proc/{process}/cmdline").read_bytes()

    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if command(child) == command(pid)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_ranks_replace_a_bad_sample_and_stop_together_over_the_budget(
    shards: Path, write_recipe: Any, tmp_path: Path
) -> None:
    """24 samples an epoch: 0.05 of them is one. The second bad one appears after the first two epochs."""
    recipe, output = write_recipe(TINY_MAE, shards), tmp_path / "run"
    command = ("train.py", recipe, "data.max_bad=0.05")
    first, other = forked.run_ranks(2, [*command, "max_steps=6"], ROOT)
    assert first.returncode == other.returncode == 0, first.stderr + other.stderr
    told = [record for path in sorted(output.glob("data_faults-[01].jsonl")) for record in lines(path)]
    key = ShardIndex.open(shards).key(BAD)
    assert {record["key"] for record in told} == {key}
    assert all("cannot be decoded" in record["reason"] for record in told)
    steps = [record["step"] for record in told if record["attempt"] == 0]
    assert [record["data_faults"] for record in lines(output / "metrics.jsonl")] == [
        sum(step <= now for step in steps) for now in range(1, 7)
    ]
    assert (first.stderr + other.stderr).count(f"ummim: for the figures: shard-000001.tar: key {key!r} at byte") == 1
    assert list((output / "reconstructions").iterdir())

    for row in (3, 10):
        overwrite(shards, row)
    second = run(BIN / "torchrun", "--standalone", "--nproc_per_node", "2", *command)
    errors = [line for line in second.stderr.splitlines() if line.startswith("ummim: ") and "error" in line]
    assert len(errors) == 1, second.stderr
    assert "of 24 samples of epoch 3 cannot be read, and data.max_bad = 0.05 allows 1" in errors[0]
    assert "exitcode  : 2" in second.stderr
    told = [record for path in sorted(output.glob("data_faults-[01].jsonl")) for record in lines(path)]
    last = max(record["step"] for record in told)
    assert f"saved after step {last}," in errors[0]
    assert (output / "checkpoints" / f"step-{last}").is_dir()


def test_shards_that_are_gone_end_the_run_with_one_message(shards: Path, write_recipe: Any, tmp_path: Path) -> None:
    """All of them, while it reads: no step is made of nothing."""
    recipe, output = write_recipe(TINY_MAE, shards), tmp_path / "run"
    command = ["train.py", recipe, "epochs=4000", "data.max_bad=1", "checkpoint_every=100000"]
    process = forked.Job([*command, "data.workers=1", "figure_every=0"], ROOT)
    while not ((output / "metrics.jsonl").exists() and lines(output / "metrics.jsonl")[3:]):
        assert process.poll() is None
        time.sleep(0.05)
    for path in shards.glob("*.tar"):
        os.truncate(path, 0)
    ended = process.wait(120)
    errors = ended.stderr
    assert ended.returncode == 2, errors
    assert "Traceback" not in errors
    (message,) = (line for line in errors.splitlines() if line.startswith("ummim: error: "))
    assert "no other sample can be read in its place: are the shards still there? Stopped in step" in message
    assert "shard-" in message


def test_a_killed_worker_changes_no_bit(shards: Path, write_recipe: Any, tmp_path: Path) -> None:
    recipe, losses = write_recipe(TINY_MAE, shards), {}
    for name, victim in (("whole", False), ("hit", True)):
        command = ["train.py", recipe, f"output={tmp_path / name}", "data.workers=1", "epochs=30"]
        process = forked.Job([*command, "data.max_bad=1", "figure_every=0", "checkpoint_every=100"], ROOT)
        while victim and process.poll() is None:
            if (workers := forks(process.pid)) and (tmp_path / name / "metrics.jsonl").exists():
                os.kill(workers[-1], signal.SIGKILL)
                break
            time.sleep(0.01)
        ended = process.wait(120)
        errors = ended.stderr
        assert ended.returncode == 0, errors
        assert ("killed by SIGKILL, restarting (1 of 3): the machine may" in errors) == victim
        losses[name] = [(record["step"], record["loss"]) for record in lines(tmp_path / name / "metrics.jsonl")]
    assert losses["hit"] == losses["whole"]
    assert [step for step, _ in losses["hit"]] == list(range(1, 91))


def test_attention_maps_of_bad_images_are_told_of_and_held_against_the_budget(
    shards: Path, write_recipe: Any, tmp_path: Path
) -> None:
    """With this seed, the first epoch's steps leave the bad image out, and the refresh after them does not."""
    driven = TINY_MAE.replace("name: mae", "name: amt\n  attention: {refresh_epochs: 1}")
    command = ["train.py", write_recipe(driven, shards), "seed=5", "max_steps=4", "figure_every=0"]
    told = "1 of 26 images cannot be read for their attention maps; the first is shard-000001.tar: key '"
    refused = forked.run([*command, "data.max_bad=0"], ROOT)
    assert refused.returncode == 2
    assert f"ummim: error: {told}" in refused.stderr
    assert [record["step"] for record in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    allowed = forked.run([*command, "data.max_bad=0.05", f"output={tmp_path / 'other'}"], ROOT)
    assert allowed.returncode == 0, allowed.stderr
    assert f"ummim: {told}" in allowed.stderr
    assert "they have the maps of others" in allowed.stderr
