"""Memory of a run's states."""

import pytest

from ummim.capacity import zero_state_bytes

PARAMETERS = 1_000_000


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [  # ZeRO paper, section 5: 2 + 2 + 12 bytes a weight in 16 bits
        (0, "bf16", 16.0),
        (2, "fp16", 2 + 14 / 8),
        (3, "fp16", 16 / 8),
        (1, "bf16", 2 + 4 + 12 / 8),  # gradients accumulate in float32
        (2, "bf16", 2 + 16 / 8),
        (0, "fp32", 16.0),
        (2, "fp32", 4 + (4 + 12) / 8),  # DeepSpeed clones the partition it updates
        (3, "fp32", 16 / 8),
    ],
)
def test_bytes_per_weight_on_eight_ranks(stage: int, precision: str, expected: float):
    assert zero_state_bytes(PARAMETERS, stage, precision, 8).total == pytest.approx(expected * PARAMETERS)
