"""Stragglers and the checkpoint interval: formulas and simulation against each other and against known values."""

import numpy as np
import pytest

from ummim.capacity.failures import Checkpointing, expected_maximum, simulate, simulated_optimum

CLUSTERS = [
    Checkpointing(blocked=1, delay=5, restart=240, mtbf=6335 * 3600 / 64),
    Checkpointing(blocked=30, delay=0, restart=300, mtbf=86_400),
    Checkpointing(blocked=120, delay=60, restart=240, mtbf=36_000),
    Checkpointing(blocked=600, delay=0, restart=600, mtbf=10_800),  # a third of the time is lost
]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [(1, 0.0), (2, 1 / np.sqrt(np.pi)), (3, 1.5 / np.sqrt(np.pi)), (8, 1.42360), (100, 2.50759)],  # Tippett, 1925
)
def test_the_slowest_of_many_ranks(ranks: int, expected: float):
    assert expected_maximum(ranks) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("costs", CLUSTERS)
def test_daly_and_the_simulation_find_the_same_optimum(costs: Checkpointing):
    interval, share = simulated_optimum(costs)
    assert interval == pytest.approx(costs.daly, rel=0.03)
    assert share == pytest.approx(costs.overhead(costs.daly), rel=0.02)
    assert costs.young == pytest.approx(costs.daly, rel=0.15)


@pytest.mark.parametrize("costs", CLUSTERS)
def test_no_other_interval_is_better(costs: Checkpointing):
    best = costs.overhead(costs.daly)
    for factor in (0.5, 0.8, 1.25, 2.0):
        assert costs.overhead(factor * costs.daly) > best
    intervals = costs.daly * np.array([1 / 4, 1.0, 4.0])
    shares = simulate(costs, intervals)
    assert shares[1] < min(shares[0], shares[2])
    assert shares == pytest.approx([costs.overhead(interval) for interval in intervals], rel=0.03)


def test_where_writing_takes_longer_than_a_failure_takes_to_come():
    hopeless = Checkpointing(blocked=5000, delay=0, restart=60, mtbf=2000)
    assert hopeless.daly == hopeless.mtbf
    assert 0.9 < hopeless.overhead(hopeless.daly) <= 1
