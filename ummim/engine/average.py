"""The moving average of the weights (EMA), in float32, cut up among the ranks like the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ummim.engine import zero_state
from ummim.engine.checkpoint_shards import MASTER


class Average:
    """The exponential moving average of an engine's master weights, at any ZeRO stage.

    Each rank keeps that of the elements it holds. After n steps the decay is the least of ``decay`` and
    (1 + n) / (10 + n), so that the first weights are soon forgotten (TensorFlow's rule); it is saved with the rest.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine, self.decay = engine, decay
        flats = {id(fragment.flat): fragment.flat for fragment in zero_state.held(engine)}
        self._pairs = {key: (flat, self._master(flat).clone()) for key, flat in flats.items()}

    def of(self, flat: Tensor) -> Tensor:
        """The average of one of the tensors that master weights lie in."""
        return self._pairs[id(flat)][1]

    def _master(self, flat: Tensor) -> Tensor:
        return zero_state.state_of(self.engine, flat)[MASTER].detach()

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the weights after ``steps`` optimizer steps."""
        share = 1 - min(self.decay, (1 + steps) / (10 + steps))
        for flat, average in self._pairs.values():
            average.lerp_(self._master(flat), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it, the model computes with the average; then with its own weights again, bit for bit.

        Every rank must enter it.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for flat, average in self._pairs.values():
            with zero_state.in_memory(self.engine, flat):
                kept = flat.detach().clone()
                flat.detach().copy_(average)
                average.copy_(kept)
        zero_state.cast_masters(self.engine)
