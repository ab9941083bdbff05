"""Slow ranks, failures, and how often to write a checkpoint: by formula and by simulation, beside each other.

Sources: Young, "A first order approximation to the optimum checkpoint interval" (1974); Daly, "A higher order estimate
of the optimum checkpoint interval for restart dumps" (2006).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

FAILURES = 200_000  # simulated; the optimum's overhead is then known to about 1%


@lru_cache
def expected_maximum(ranks: int) -> float:
    """E[max] of ``ranks`` independent standard normal numbers: every step waits for its slowest rank.

    The integral of 1 - Phi(x)^n over x > 0 less that of Phi(x)^n over x < 0, by the midpoint rule.
    """
    width = 1e-3
    x = np.arange(-9.0, 9.0, width) + width / 2
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x]) ** ranks
    return float(np.where(x > 0, 1 - below, -below).sum() * width)


@dataclass(frozen=True)
class Checkpointing:
    """What a checkpoint costs, in seconds.

    Attributes:
        blocked: training stands still.
        delay: from the end of that until the checkpoint is whole and could be resumed from; written beside training.
        restart: from a failure to the first new step.
        mtbf: mean time between failures of the whole cluster.
    """

    blocked: float
    delay: float
    restart: float
    mtbf: float

    @property
    def young(self) -> float:
        """Seconds of training between checkpoints."""
        return math.sqrt(2 * self.blocked * self.mtbf)

    @property
    def daly(self) -> float:
        """Likewise, by Daly's higher-order estimate."""
        if self.blocked >= 2 * self.mtbf:
            return self.mtbf
        share = self.blocked / (2 * self.mtbf)
        return self.young * (1 + math.sqrt(share) / 3 + share / 9) - self.blocked

    def overhead(self, interval: float) -> float:
        """Expected share of the wall time that is not training, for exponential failures, in closed form.

        Daly's model: a segment of ``interval`` and its checkpoint is begun anew after each failure, and failures may
        hit a restart too. What was trained while the last checkpoint was still being written is lost as well.
        """
        mtbf = self.mtbf
        segment = interval + self.blocked
        if segment > 100 * mtbf:  # next to none is ever whole
            return 1.0
        rate = interval / mtbf * math.exp(-(self.restart + self.delay) / mtbf) / math.expm1(segment / mtbf)
        return 1 - rate


def simulate(checkpointing: Checkpointing, intervals: np.ndarray, seed: int = 0) -> np.ndarray:
    """(n,) shares of the wall time that is not training, for (n,) seconds of training between checkpoints.

    Failures come at exponential times, the same ones for every interval. After each, the run restarts, and until the
    next it banks every segment whose checkpoint was whole by then.
    """
    gaps = np.random.default_rng(seed).exponential(checkpointing.mtbf, FAILURES)  # (FAILURES,) s
    usable = np.maximum(gaps - checkpointing.restart - checkpointing.delay, 0.0)
    banked = np.array([np.floor(usable / (tau + checkpointing.blocked)).sum() * tau for tau in intervals])
    return 1 - banked / gaps.sum()


def simulated_optimum(checkpointing: Checkpointing, seed: int = 0) -> tuple[float, float]:
    """The best interval in seconds, and its overhead.

    The curve is flat around its lowest point and the simulation is noisy: the lowest point of a cubic in the logarithm
    of the interval, fitted from a quarter to four times Young's.
    """
    logs = np.linspace(math.log(checkpointing.young / 4), math.log(checkpointing.young * 4), 81)
    shares = simulate(checkpointing, np.exp(logs), seed)
    near = shares < shares.min() + 0.5 * (np.median(shares) - shares.min())
    fit = np.polynomial.Polynomial.fit(logs[near], shares[near], 3)
    fine = np.linspace(logs[near].min(), logs[near].max(), 2001)
    best = int(np.argmin(fit(fine)))
    return float(np.exp(fine[best])), float(fit(fine[best]))
