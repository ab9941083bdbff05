"""One training run, however it is cut: ZeRO stages, ranks, micro-batches, precision, activation checkpointing.

All cases of a world size share one process group. A method's 12 runs of 20 steps are the fewest in which each pair of
stage, ranks and accumulation meets; benchmarks/parity.py runs all 24.
"""

from itertools import product

import pytest

from tests.methods.tiny import METHODS
from tests.strategies import Case, Numbers, launch

pytestmark = pytest.mark.timeout(1800)

# (ranks, accumulation) by ZeRO stage
CUTS = {
    0: ((1, 1), (2, 1), (4, 4)),
    1: ((1, 1), (2, 4), (4, 1)),
    2: ((1, 4), (2, 1), (4, 1)),
    3: ((1, 4), (2, 1), (4, 1)),
}
FULL = ("mae", "um_mae", "green_mim", "mff", "tec", "simmim", "local_mim", "amt")  # a recipe of each method
OTHERS = tuple(name for name in METHODS if name not in FULL)  # the same on other encoders: fewer steps, fewer cuts
TAPPED = ("mff", "local_mim", "local_mim_swin")  # encoder blocks whose outputs go to decoders as well
STEPS, FEW = 20, 4
KINDS = ("torch", "deepspeed", "fairscale", "fairscale_offload")


def plain(name: str) -> Case:
    return Case(name, 0, 1, 1, STEPS if name in FULL else FEW)


def cuts(name: str) -> list[Case]:
    if name in OTHERS:
        return [Case(name, 2, 1, 4, FEW), Case(name, 3, 2, 1, FEW)]
    return [Case(name, stage, *cut, STEPS) for stage, pairs in CUTS.items() for cut in pairs]


def half(name: str) -> tuple[Case, Case]:
    """In bf16, without and with activation checkpointing: each kind comes under ZeRO-2 and under ZeRO-3."""
    number = list(METHODS).index(name)
    case = Case(name, 2 + number // len(KINDS) % 2, 2, 1, FEW, "bf16")
    return case, case._replace(checkpointing=KINDS[number % len(KINDS)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Numbers]:
    cases = {case for name in METHODS for case in (plain(name), *cuts(name), *half(name))}
    return launch(tmp_path_factory.mktemp("parallel"), sorted(cases))


def test_each_pair_of_stage_ranks_and_accumulation_meets():
    triples = [(case.stage, case.ranks, case.accumulation) for case in cuts("mae")]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        values = ({triple[one] for triple in triples}, {triple[other] for triple in triples})
        assert {(triple[one], triple[other]) for triple in triples} == set(product(*values))
    assert {(half(n)[1].stage, half(n)[1].checkpointing) for n in METHODS} == set(product((2, 3), KINDS))


@pytest.mark.parametrize("name", METHODS)
def test_every_cut_gives_the_same_losses_and_gradient_norms_in_fp32(runs: dict[Case, Numbers], name: str):
    """Relative 2e-6 for losses and 1e-5 for norms; 1e-3 for the norms of SimMIM's absolute error, whose gradient is a
    sign: rounding turns it where a prediction meets its target."""
    losses, norms = runs[plain(name)]
    assert len(set(losses)) == len(losses) and all(norm > 0 for norm in norms)
    for case in cuts(name):
        assert runs[case].losses == pytest.approx(losses, rel=2e-6), case
        assert runs[case].norms == pytest.approx(norms, rel=1e-3 if "simmim" in name else 1e-5), case


@pytest.mark.parametrize("name", METHODS)
def test_bf16_stays_near_fp32(runs: dict[Case, Numbers], name: str):
    """bfloat16 rounds each activation by up to 2^-9 = 2e-3 of itself; the loss is a float32 mean over thousands of
    predictions, so rounding largely cancels in it, while the weights' float32 masters follow gradients that are off
    by a few 2^-9. A wrong gradient scale shows in the norms, where up to 7% was seen: on a CPU, PyTorch adds up
    the gradient of a LayerNorm's weight over thousands of rows in bfloat16."""
    found, expected = runs[half(name)[0]], runs[plain(name)]
    assert found.losses == pytest.approx(expected.losses[:FEW], rel=2e-2)
    assert found.norms == pytest.approx(expected.norms[:FEW], rel=0.1)


@pytest.mark.parametrize("name", METHODS)
def test_activation_checkpointing_changes_no_bit(runs: dict[Case, Numbers], name: str):
    """Where a block's output also goes elsewhere, the kinds of DeepSpeed and fairscale add up its gradients in another
    order, which bfloat16 shows."""
    without, checkpointed = half(name)
    if name in TAPPED and checkpointed.checkpointing != "torch":
        for field in ("losses", "norms"):
            assert getattr(runs[checkpointed], field) == pytest.approx(getattr(runs[without], field), rel=1e-3)
    else:
        assert runs[checkpointed] == runs[without], checkpointed
