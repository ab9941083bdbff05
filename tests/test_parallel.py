"""Real methods on two ranks: ZeRO stages agree, activation checkpointing changes no bit, bf16 stays near fp32."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY_MAE, TINY_UM_MAE
from tests.methods.tiny import METHODS
from ummim.data.config import DataConfig
from ummim.engine.optim import OptimConfig
from ummim.recipe import Recipe
from ummim.recipe_file import dump_recipe

STAGES = [[f"zero_stage={stage}"] for stage in range(4)]
KINDS = ("torch", "deepspeed", "fairscale", "fairscale_offload")
CHECKPOINTED = [[*stage, f"activation_checkpointing={kind}"] for stage in STAGES for kind in KINDS]
BF16 = [[*stage, "precision=bf16"] for stage in STAGES]
COMMON = ["checkpoint_every=1000", "micro_batch=2"]  # two ranks, two micro-batches each

Losses = dict[tuple[str, ...], list[float]]


def launch(folder: Path, cases: Sequence[tuple[str, ...]], steps: int) -> Losses:
    """Each case's losses, from one launch on two ranks; a case is a recipe file in ``folder`` and overrides.

    ZeRO-3 comes last: DeepSpeed then replaces torch's linear for good by one that adds the bias apart, 1 ulp away.
    It partitions even the smallest weights here, all of which it would keep whole by default.
    """
    zero3 = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "zero3.json").write_text(json.dumps(zero3))
    common = {"zero_stage=3": [*COMMON, f"ds_config={folder}/zero3.json"]}
    ordered = sorted(cases, key=lambda case: case[1])
    jobs = json.dumps(
        [[str(folder / file), *rest, *common.get(rest[0], COMMON), f"max_steps={steps}"] for file, *rest in ordered]
    )
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2",
               "-m", "tests.parallel", str(folder), jobs]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    lines = [json.loads(line) for line in job.stdout.splitlines() if line.startswith("[")]
    assert job.returncode == 0, f"after {len(lines)} of {len(cases)} cases: {job.stderr}"
    return dict(zip(ordered, lines, strict=True))


@pytest.fixture(scope="module", params=[TINY_MAE + "throw_ratio: 0.5\n", TINY_UM_MAE], ids=["mae", "um_mae"])
def losses(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Ten steps of every strategy."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "tiny.yaml").write_text(request.param)
    return launch(folder, [("tiny.yaml", *case) for case in STAGES + CHECKPOINTED + BF16], steps=10)


def test_zero_stages_agree_in_fp32(losses: Losses):
    plain = losses["tiny.yaml", "zero_stage=0"]
    assert len(plain) == 10
    assert plain[-1] < plain[0]
    for stage in STAGES:
        assert losses["tiny.yaml", stage[0]] == pytest.approx(plain, rel=1e-6)


def test_activation_checkpointing_changes_no_bit(losses: Losses):
    for case in CHECKPOINTED:
        assert losses["tiny.yaml", *case] == losses["tiny.yaml", case[0]], case


def test_bf16_stays_near_fp32(losses: Losses):
    """bfloat16 rounds each activation by up to 2^-9 = 2e-3 of itself; the loss is a float32 mean over thousands of
    predictions, so rounding largely cancels in it, while the weights' float32 masters follow gradients that are off
    by a few 2^-9. 1e-2 relative leaves room for ten steps of that; a lost master copy or a wrong gradient scale
    ends above it."""
    for case in BF16:
        assert losses["tiny.yaml", *case] == pytest.approx(losses["tiny.yaml", case[0]], rel=1e-2), case


MIXED = [
    (stage, *checkpointing, *precision)
    for stage in ("zero_stage=2", "zero_stage=3")
    for checkpointing in ((), ("activation_checkpointing=torch",))
    for precision in ((), ("precision=bf16",))
]


SOME = 4  # methods of one launch


@pytest.fixture(scope="module", params=range(0, len(METHODS), SOME))
def some_methods(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Three steps of some methods, under ZeRO-2 and ZeRO-3, with tokens thrown where the method can."""
    folder = tmp_path_factory.mktemp("methods")
    names = list(METHODS)[request.param : request.param + SOME]
    for name in names:
        tiny = METHODS[name]
        recipe = Recipe(
            method=tiny.config,
            data=DataConfig("nowhere", image_size=tiny.image_size),
            epochs=1,
            global_batch=8,
            mask=tiny.mask,
            throw_ratio=tiny.throw[-1],
            optim=OptimConfig(base_lr=1e-2, warmup_epochs=0.2),
            precision="fp32",
            log_every=1,
            tensorboard=False,
        )
        (folder / f"{name}.yaml").write_text(dump_recipe(recipe))
    return launch(folder, [(f"{name}.yaml", *case) for name in names for case in MIXED], steps=3)


def test_every_method_trains_alike_under_every_strategy(some_methods: Losses):
    recompute = "activation_checkpointing=torch"
    for file in {case[0] for case in some_methods}:
        plain = some_methods[file, "zero_stage=2"]
        assert len(set(plain)) == 3, file
        for stage in ("zero_stage=2", "zero_stage=3"):
            full = some_methods[file, stage]
            assert full == pytest.approx(plain, rel=1e-5), file
            assert some_methods[file, stage, recompute] == full, file
            half = some_methods[file, stage, "precision=bf16"]
            assert half == pytest.approx(full, rel=2e-2), file
            assert some_methods[file, stage, recompute, "precision=bf16"] == half, file
