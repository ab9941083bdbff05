"""The loss of every method is float32 in 16-bit training, under autocast and with 16-bit weights."""

import pytest
import torch

from tests.methods.tiny import METHODS
from ummim.masking import PlanSampler
from ummim.nn.aggregation import PartialConfig


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_float32_in_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    tiny = METHODS[name]
    torch.manual_seed(0)
    model = tiny.config.build(tiny.image_size, PartialConfig(), tiny.throw[-1] > 0)
    sampler = PlanSampler(model.grid, tiny.mask, tiny.throw[-1])
    plan = sampler.stack([sampler(0), sampler(0 if tiny.config.shared_mask else 1)])
    images = torch.randn(2, 3, tiny.image_size, tiny.image_size)
    exact = model(images, plan).loss
    with torch.autocast("cpu", dtype):
        autocast = model(images, plan).loss
    autocast.backward()
    model.zero_grad()
    for parameter in model.parameters():  # as the engine does: buffers stay float32
        parameter.data = parameter.data.to(dtype)
    rounded = model(images, plan).loss
    rounded.backward()
    for loss in (autocast, rounded):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact, rtol=5e-4, atol=0)
