"""A run goes on at another world size, ZeRO stage and precision: the same state, and the losses it would have had.

One launch for all cases of a world size (``elastic.py``); one rank is this process.
"""

import json
import math
from typing import Any

import pytest
import torch

from tests.engine.conftest import losses, run_ranks
from tests.engine.elastic import train
from ummim.engine import resume, zero
from ummim.engine.checkpoint_shards import BUFFER, FROZEN, MASTER, Contents

OFFLOAD = str(zero.config_folder() / "zero3_offload.json")
FP16 = {"precision": "fp16", "scale": 256.0}

Cases = dict[str, tuple[int, dict[str, Any]]]

# Name of a run -> world size and case. Those without ``from`` are undisturbed; the others go on from its fifth step.
ONE_FIRST: Cases = {"one": (1, {"zero_stage": 1})}
TWO: Cases = {
    "zero0": (2, {"zero_stage": 0}),
    "zero1": (2, {"zero_stage": 1}),
    "zero2": (2, {"zero_stage": 2}),
    "zero3": (2, {"zero_stage": 3}),
    "bf16": (2, {"zero_stage": 1, "precision": "bf16"}),
    "fp16": (2, {"zero_stage": 2, **FP16}),
    "zero2 to 3": (2, {"zero_stage": 3, "from": "zero2"}),
    "zero3 to 2": (2, {"zero_stage": 2, "from": "zero3"}),
    "zero0 to 3": (2, {"zero_stage": 3, "from": "zero0"}),
    "zero1 to 2": (2, {"zero_stage": 2, "from": "zero1"}),
    "bf16 zero1 to 0": (2, {"zero_stage": 0, "precision": "bf16", "from": "bf16"}),
    "bf16 to fp32, zero1 to 3": (2, {"zero_stage": 3, "from": "bf16"}),
    "fp16 zero2 to 0": (2, {"zero_stage": 0, "precision": "fp16", "from": "fp16"}),
    "1 to 2 ranks, zero1 to 3": (2, {"zero_stage": 3, "from": "one"}),
}
FOUR: Cases = {
    "2 to 4 ranks": (4, {"zero_stage": 2, "from": "zero2"}),
    "2 to 4 ranks, zero0 to 3": (4, {"zero_stage": 3, "from": "zero0"}),
}
ONE: Cases = {
    "2 to 1 ranks": (1, {"zero_stage": 2, "from": "zero2"}),
    "2 to 1 ranks, zero3 to 0": (1, {"zero_stage": 0, "from": "zero3"}),
    "2 to 1 ranks, bf16 zero1": (1, {"zero_stage": 1, "precision": "bf16", "from": "bf16"}),
    "2 to 1 ranks, offloaded": (1, {"zero_stage": 3, "ds_config": OFFLOAD, "from": "zero2"}),
    "2 to 1 ranks, fp16 to bf16": (1, {"zero_stage": 3, "precision": "bf16", "from": "fp16"}),
}
MOVED = {name: case for name, (_, case) in {**TWO, **FOUR, **ONE}.items() if "from" in case}


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """The folder that holds each run's, by its name."""
    folder = tmp_path_factory.mktemp("runs")

    def cases(named):
        for name, (_, case) in named.items():
            origin = {"from": str(folder / case["from"] / "checkpoints" / "step-5")} if "from" in case else {}
            yield {**case, **origin, "output": str(folder / name)}

    def here(named):
        for case in cases(named):
            train(case, world)

    def launched(ranks, named):
        jobs = run_ranks(ranks, "elastic", list(cases(named)))
        assert not any(job.returncode for job in jobs), [job.stderr[-3000:] for job in jobs]

    here(ONE_FIRST)
    launched(2, TWO)
    launched(4, FOUR)
    here(ONE)
    return folder


def contents(step):
    state = resume.read_state(step)
    return state, Contents(step, state.step, state.layout)


@pytest.mark.parametrize("name", MOVED)
def test_weights_moments_and_counters_are_the_same_to_the_bit(runs, name):
    """What a run has restored, saved again at once, is what was saved before."""
    before, old = contents(runs / MOVED[name]["from"] / "checkpoints" / "step-5")
    after, new = contents(runs / f"{name}-again" / "checkpoints" / "step-5")
    assert old.shapes == new.shapes and len(old.shapes) == 32
    for parameter, shape in old.shapes.items():
        for kind in (MASTER, "exp_avg", "exp_avg_sq"):
            ours, theirs = (each.read(kind, parameter, 0, math.prod(shape)) for each in (new, old))
            assert torch.equal(ours, theirs), (kind, parameter)
            assert kind != "exp_avg_sq" or ours.max() > 0, parameter
    assert set(old.full) == set(new.full) == {f"{FROZEN}/table", f"{BUFFER}/scale"}
    assert all(torch.equal(old.whole(key), new.whole(key)) for key in old.full)
    assert (before.step, before.samples) == (after.step, after.samples) == (5, 40)
    assert after.optimizer["adam_steps"] == before.optimizer["adam_steps"] == 5


@pytest.mark.parametrize("name", MOVED)
def test_the_losses_are_those_of_the_run_left_alone(runs, name):
    """Relative 1e-6 in fp32 (ZeRO-1 adds micro-batches up before ranks, ZeRO-2 after, and how that rounds is up to the
    processor); 1e-3 in one 16-bit precision, 5e-3 to another, as in test_stages."""
    case, origin = MOVED[name], runs / MOVED[name]["from"]
    before, after = losses(origin), losses(runs / name)
    assert list(after) == [6, 7, 8, 9, 10]
    whole = resume.read_state(origin / "checkpoints" / "step-5")
    precision = case.get("precision", "fp32")
    near = 5e-3 if precision != whole.precision else 1e-6 if precision == "fp32" else 1e-3
    assert list(after.values()) == pytest.approx([before[step] for step in after], rel=near)


def test_the_loss_scale_goes_on(runs):
    saved, again = (
        resume.read_state(runs / name / "checkpoints" / "step-5").optimizer["loss_scaler"]
        for name in ("fp16", "fp16 zero2 to 0-again")
    )
    assert saved == {"cur_scale": 256.0, "cur_iter": 5, "last_overflow_iter": -1, "cur_hysteresis": 2}
    assert again == {"cur_scale": 256.0, "cur_iter": 5, "last_overflow_iter": -1}  # all that this wrapper has
    last = resume.read_state(runs / "2 to 1 ranks, fp16 to bf16" / "checkpoints" / "step-10")
    assert last.optimizer["loss_scaler"] is None


def test_each_rank_writes_its_share(runs):
    """Two ranks' files hold every element once, and are of about the same size."""
    for name in ("zero0", "zero1", "zero2", "zero3"):
        step = runs / name / "checkpoints" / "step-5"
        sizes = [path.stat().st_size for path in sorted(step.glob("rank-*"))]
        _, table = contents(step)
        elements = sum(math.prod(shape) for shape in table.shapes.values())
        whole = sum(table.whole(key).numel() for key in table.full)
        headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in step.glob("rank-*"))
        assert sum(sizes) - headers == 4 * (3 * elements + whole)
        assert max(sizes) < 1.1 * min(sizes)
        assert not any(path.suffix == ".pt" for path in step.iterdir())


def test_the_weights_of_the_end_are_the_masters(runs):
    from safetensors.torch import load_file

    for name in ("bf16", "zero3", "2 to 4 ranks"):
        step = runs / name / "checkpoints" / "step-10"
        _, table = contents(step)
        stored, made = load_file(step / "model.safetensors"), table.weights()
        assert stored.keys() == made.keys()
        assert all(torch.equal(stored[key], made[key]) for key in made)
        assert not (runs / name / "checkpoints" / "step-5" / "model.safetensors").exists()
        assert json.loads((step / "state.json").read_text())["milestone"] is False
