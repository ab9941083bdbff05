"""What is calculated of memory and communication is what a real engine holds and sends: bytes, not estimates.

Two launches (``probe.py``) run all cases: one rank, and two.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import environment
from tests.engine.toy import ToyPlan, ToyRecipe, build_toy
from ummim.capacity.activations import counted_as, measure
from ummim.capacity.communication import collectives
from ummim.capacity.memory import bucket_bytes, gathered_elements
from ummim.capacity.states import state_bytes
from ummim.capacity.strategy import Shapes, Strategy
from ummim.cost import fused_attention, plain_attention
from ummim.engine.zero import config_folder, deepspeed_config
from ummim.recipe_file import load_recipe

SMALL: dict[int, dict[str, Any]] = {stage: {"reduce_bucket_size": 20_000} if stage else {} for stage in range(4)}
STATES = [
    {"zero_stage": stage, "precision": precision, "zero": SMALL[stage]}
    for precision in ("fp32", "bf16", "fp16")
    for stage in range(4)
]
CUT: dict[str, Any] = {"zero_stage": 3, "precision": "bf16"}
NOTHING_PERSISTS: dict[str, Any] = {**CUT, "zero": {**SMALL[3], "stage3_param_persistence_threshold": 0}}
LET_GO = {**CUT, "zero": {**NOTHING_PERSISTS["zero"], "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}}
TO_OWNERS = {"zero_stage": 2, "precision": "bf16", "zero": {**SMALL[2], "use_multi_rank_bucket_allreduce": False}}
TWO_RANKS = [*STATES, NOTHING_PERSISTS, LET_GO, TO_OWNERS]
ONE_RANK = [STATES[2], *STATES[4:8]]

TINY = ["data.shards=nowhere", "data.image_size=64", "zero_stage=0", "precision=fp32"]
VIT = "method.encoder={patch_size: 8, embed_dim: 96, depth: 4, num_heads: 3}"
SWIN = "method.encoder={embed_dim: 32, depths: [1, 1, 2, 1], num_heads: [1, 2, 4, 8], window_size: 4, pos_mlp_dim: 8}"
DECODER = "method.decoder={embed_dim: 64, depth: 2, num_heads: 2}"
BATCH = ["micro_batch=16", "global_batch=32"]
METHODS = {
    "mae": ["mae_vit_base_800e", *TINY, *BATCH, VIT, DECODER],
    "simmim": ["simmim_vit_base_800e", *TINY, *BATCH, VIT],
    "um_mae_swin": ["um_mae_swin_tiny_200e", *TINY, *BATCH, SWIN, DECODER, "throw_ratio=0.5"],
    "local_mim": ["local_mim_vit_base_100e", *TINY, *BATCH, VIT.replace("depth: 4", "depth: 12")],
}
KINDS = {
    "mae": ("none", "torch", "deepspeed", "fairscale", "fairscale_offload"),
    "simmim": ("none", "torch"),
    "um_mae_swin": ("none", "deepspeed"),
    "local_mim": ("torch",),
}
CASES = [(method, kind) for method in METHODS for kind in KINDS[method]]


def name(case: Any) -> str:
    return "-".join(str(value) for value in (case if isinstance(case, tuple) else case.values()))


def overrides(method: str, kind: str) -> list[str]:
    return [*METHODS[method], f"activation_checkpointing={kind}"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """World size -> the probe's lines."""
    found = {}
    for ranks in (1, 2):
        arguments: dict[str, Any] = {"folder": str(tmp_path_factory.mktemp("probe"))}
        arguments["states"] = ONE_RANK if ranks == 1 else TWO_RANKS
        if ranks == 1:
            arguments["activations"] = [{"recipe": overrides(*case), "plain": case[0] != "mae"} for case in CASES]
        launcher = [sys.executable, "-m"]
        if ranks > 1:
            launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
        words = [*launcher, "tests.capacity.probe", json.dumps(arguments)]
        job = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=600)
        assert job.returncode == 0, job.stderr[-3000:]
        found[ranks] = [json.loads(line) for line in job.stdout.splitlines() if line.startswith(("[", "{"))]
        assert len(found[ranks]) == len(arguments["states"]) + len(arguments.get("activations", []))
    return found


def strategy(case: dict[str, Any], folder: Path, ranks: int) -> Strategy:
    config = json.loads((config_folder() / f"zero{case['zero_stage']}.json").read_text())
    config["zero_optimization"].update(case["zero"])
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    recipe = ToyRecipe(zero_stage=case["zero_stage"], precision=case["precision"], ds_config=str(path))
    return Strategy.of(deepspeed_config(recipe, ToyPlan(world_size=ranks)), case["precision"])


@pytest.mark.parametrize(("ranks", "case"), [*((1, case) for case in ONE_RANK), *((2, case) for case in TWO_RANKS)])
def test_state_bytes_are_exact_on_every_rank(measured, tmp_path: Path, ranks: int, case: dict[str, Any]):
    lines = measured[ranks][(ONE_RANK if ranks == 1 else TWO_RANKS).index(case)]
    shapes, found = Shapes.of(build_toy()), strategy(case, tmp_path, ranks)
    assert len(lines) == ranks
    for rank, line in enumerate(lines):
        state = state_bytes(shapes, found, ranks, rank)
        assert line["between"]["rest"] == state.total - 4  # but for the one buffer, a single number
    if found.stage in (1, 3) and not found.bf16_optimizer:  # those of stage 2 are gone between two passes
        bucket = lines[0]["between"]["buckets"]
        copy = min(found.reduce_bucket, shapes.trainable) * found.communicate if found.stage == 3 else 0
        assert bucket == bucket_bytes(found, shapes.trainable) - copy


@pytest.mark.parametrize("case", TWO_RANKS, ids=name)
def test_two_ranks_send_what_is_calculated(measured, tmp_path: Path, case: dict[str, Any]):
    lines = measured[2][TWO_RANKS.index(case)]
    expected: dict[str, int] = {}
    for collective in collectives(Shapes.of(build_toy()), strategy(case, tmp_path, 2), 2, ToyPlan().accumulation):
        expected[collective.kind] = expected.get(collective.kind, 0) + collective.size * collective.passes
    for line in lines:
        assert line["collectives"] == expected


def test_stage_3_gathers_twice_only_where_it_lets_go(tmp_path: Path):
    """DeepSpeed's default reuse distance is longer than these models: the backward pass finds all weights gathered."""
    shapes = Shapes.of(build_toy())
    kept, gone = strategy(NOTHING_PERSISTS, tmp_path, 2), strategy(LET_GO, tmp_path, 2)
    assert gathered_elements(shapes, 10, kept, 2) == sum(shapes.all)
    assert gathered_elements(shapes, 10, gone, 2) == 10
    assert gathered_elements(shapes, 10, kept, 1) == 0  # alone, what is gathered is the part itself
    phases = [c.phase for c in collectives(shapes, gone, 2, 1) if c.kind == "all-gather"]
    assert phases == ["forward", "backward"]


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_activations_are_within_five_percent_of_a_real_step(measured, method: str, kind: str):
    line = measured[1][len(ONE_RANK) + CASES.index((method, kind))]
    attention = fused_attention if method == "mae" else plain_attention
    found = measure(load_recipe(METHODS[method][0], overrides(method, kind)[1:]), counted_as(kind), attention)
    images = line["images"]
    if kind == "fairscale_offload":  # host and device are one here, so that nothing leaves
        full = measure(load_recipe(METHODS[method][0], overrides(method, kind)[1:]), "fairscale", attention)
        assert found.saved + found.host == pytest.approx(full.saved, rel=0.02)
        found = full
    assert line["held"] == pytest.approx(found.saved * images, rel=0.05)
    if kind != "deepspeed":  # which hides its inputs from autograd's hooks
        assert line["seen"] == pytest.approx(found.saved * images, rel=0.005)
    assert line["rise"] <= 1.05 * found.working * images + 3 * line["largest"]  # and a gradient being added up
    if method == "mae":
        assert line["rise"] == pytest.approx(found.working * images, rel=0.05)
