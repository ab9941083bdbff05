"""MAE and UM-MAE with PR-MIM on two ranks: ZeRO stages agree, activation checkpointing changes no bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY_MAE, TINY_UM_MAE

STAGES = [[f"zero_stage={stage}"] for stage in range(4)]
KINDS = ("torch", "deepspeed", "fairscale", "fairscale_offload")
CHECKPOINTED = [[*stage, f"activation_checkpointing={kind}"] for stage in STAGES for kind in KINDS]
BF16 = [[*stage, "precision=bf16"] for stage in STAGES]
# ZeRO-3 comes last: DeepSpeed then replaces torch's linear for good by one that adds the bias apart, 1 ulp away.
CASES = sorted(STAGES + CHECKPOINTED + BF16, key=lambda case: case[0])
COMMON = ["max_steps=10", "checkpoint_every=1000", "micro_batch=2"]  # two ranks, two micro-batches each

Losses = dict[str, list[float]]


@pytest.fixture(scope="module", params=[TINY_MAE + "throw_ratio: 0.5\n", TINY_UM_MAE], ids=["mae", "um_mae"])
def losses(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Ten steps' losses of every case, from one launch."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "tiny.yaml").write_text(request.param + f"output: {folder}\n")
    cases = json.dumps([case + COMMON for case in CASES])
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2",
               "-m", "tests.parallel", str(folder / "tiny.yaml"), cases]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert job.returncode == 0, job.stderr
    lines = [json.loads(line) for line in job.stdout.splitlines() if line.startswith("[")]
    return {" ".join(case): line for case, line in zip(CASES, lines, strict=True)}


def test_zero_stages_agree_in_fp32(losses: Losses):
    plain = losses["zero_stage=0"]
    assert len(plain) == 10
    assert plain[-1] < plain[0]
    for stage in STAGES:
        assert losses[stage[0]] == pytest.approx(plain, rel=1e-6)


def test_activation_checkpointing_changes_no_bit(losses: Losses):
    for case in CHECKPOINTED:
        assert losses[" ".join(case)] == losses[case[0]], case


def test_bf16_stays_near_fp32(losses: Losses):
    """bfloat16 rounds each activation by up to 2^-9 = 2e-3 of itself; the loss is a float32 mean over thousands of
    predictions, so rounding largely cancels in it, while the weights' float32 masters follow gradients that are off
    by a few 2^-9. 1e-2 relative leaves room for ten steps of that; a lost master copy or a wrong gradient scale
    ends above it."""
    for case in BF16:
        assert losses[" ".join(case)] == pytest.approx(losses[case[0]], rel=1e-2), case
