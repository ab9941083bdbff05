"""Cases of ``tests.parallel``: a method, cut over ranks and micro-batches in some way; also of benchmarks/parity.py."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tests import forked
from tests.conftest import ROOT
from tests.methods.tiny import METHODS
from ummim.data.config import DataConfig
from ummim.engine.optim import OptimConfig
from ummim.recipe import Recipe
from ummim.recipe_file import dump_recipe

GLOBAL_BATCH = 16


class Case(NamedTuple):
    """One run."""

    method: str
    stage: int
    ranks: int
    accumulation: int
    steps: int
    precision: str = "fp32"
    checkpointing: str = "none"


class Numbers(NamedTuple):
    """Of each step of a run."""

    losses: list[float]
    norms: list[float]


def write_recipe(folder: Path, name: str) -> None:
    """The tiny model of ``METHODS[name]`` as a recipe, with tokens thrown where the method can.

    Where samples share a mask, the whole global batch does: a micro-batch must lie within one group.
    """
    tiny = METHODS[name]
    mask = replace(tiny.mask, shared_by=GLOBAL_BATCH) if tiny.mask.shared_by > 1 else tiny.mask
    recipe = Recipe(
        method=tiny.config,
        data=DataConfig("nowhere", image_size=tiny.image_size),
        epochs=1,
        global_batch=GLOBAL_BATCH,
        mask=mask,
        throw_ratio=tiny.throw[-1],
        optim=OptimConfig(base_lr=1e-2, warmup_epochs=0.2),
        log_every=1,
        tensorboard=False,
        hang_seconds=0,
    )
    (folder / f"{name}.yaml").write_text(dump_recipe(recipe))


def launch(folder: Path, cases: Sequence[Case]) -> dict[Case, Numbers]:
    """Run all ``cases``, in one process group for each number of ranks.

    ZeRO-3 comes last: DeepSpeed then replaces torch's linear for good by one that adds the bias apart, 1 ulp away.
    It partitions weights of more than 100 elements here, and keeps the others whole, as it does with larger ones.
    """
    zero3 = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    (folder / "zero3.json").write_text(json.dumps(zero3))
    for name in {case.method for case in cases}:
        write_recipe(folder, name)
    found: dict[Case, Numbers] = {}
    for ranks in sorted({case.ranks for case in cases}):
        group = sorted((case for case in cases if case.ranks == ranks), key=lambda case: case.stage)
        found |= dict(zip(group, _launch_group(folder, ranks, group), strict=True))
    return found


def _launch_group(folder: Path, ranks: int, cases: Sequence[Case]) -> list[Numbers]:
    jobs = folder / f"{ranks}.json"
    jobs.write_text(json.dumps([[str(folder / f"{case.method}.yaml"), *_overrides(folder, case)] for case in cases]))
    words = ["-m", "tests.parallel", folder / f"runs-{ranks}", jobs]
    ended = forked.run_ranks(ranks, words, ROOT, timeout=1700)
    lines = [json.loads(line) for line in ended[0].stdout.splitlines() if line.startswith("{")]
    told = f"after {len(lines)} of {len(cases)} cases on {ranks} ranks: {[job.stderr[-3000:] for job in ended]}"
    assert not any(job.returncode for job in ended), told
    for case, line in zip(cases, lines, strict=True):
        assert line["accumulation"] == case.accumulation and len(line["losses"]) == case.steps, case
    return [Numbers(line["losses"], line["norms"]) for line in lines]


def _overrides(folder: Path, case: Case) -> list[str]:
    return [
        f"zero_stage={case.stage}",
        f"micro_batch={GLOBAL_BATCH // case.ranks // case.accumulation}",
        f"max_steps={case.steps}",
        f"precision={case.precision}",
        f"activation_checkpointing={case.checkpointing}",
        *([f"ds_config={folder}/zero3.json"] if case.stage == 3 else []),
    ]
