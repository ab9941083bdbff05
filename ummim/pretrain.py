"""The pre-training task: uint8 batches in, a method's loss out."""

from torch import nn

from ummim.data import Batch
from ummim.data.normalise import normalise
from ummim.engine.trainer import TaskOutput
from ummim.methods.api import Method


class Pretraining(nn.Module):
    """What the engine trains: ``task(batch) -> TaskOutput``."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def blocks(self) -> list[nn.Module]:
        """The units of activation checkpointing."""
        return self.method.checkpointed()

    def forward(self, batch: Batch) -> TaskOutput:
        return TaskOutput(self.method(normalise(batch.images), batch.plan).loss, {})
