"""The forward has static shapes and never looks at data: one graph, and no synchronisation with the device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ummim.backbones.swin import SwinConfig
from ummim.backbones.vit import ViTConfig
from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.methods import mae, um_mae
from ummim.nn.aggregation import PartialConfig
from ummim.nn.decoder import DecoderConfig

DECODER = DecoderConfig(embed_dim=16, depth=1, num_heads=4)
METHODS = {
    "mae": (
        mae.Config(ViTConfig(patch_size=4, embed_dim=24, depth=1, num_heads=3), DECODER),
        24,
        MaskConfig(),
    ),
    "um_mae": (
        um_mae.Config(SwinConfig(8, (2, 1, 1, 1), (1, 2, 2, 4), pos_mlp_dim=6), DECODER),
        128,
        MaskConfig("uniform", 0.75, 0.25),
    ),
}


def job(name: str, throw: float) -> tuple[Any, torch.Tensor, list[MaskPlan]]:
    config, size, mask = METHODS[name]
    torch.manual_seed(0)
    model = config.build(size, PartialConfig(), throw > 0)
    sampler = PlanSampler(config.mask_grid(size), mask, throw)
    plans = [sampler.stack([sampler(seed) for seed in (i, i + 1)]) for i in (0, 5)]
    return model, torch.randn(2, 3, size, size), plans


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("throw", [0.0, 0.5])
@pytest.mark.parametrize("name", METHODS)
def test_the_forward_is_one_graph_for_every_plan(name: str, throw: float, fresh_compiler: None) -> None:
    model, images, plans = job(name, throw)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for plan in plans:
            torch.testing.assert_close(compiled(images, plan).loss, model(images, plan).loss)
    compiled(images, plans[0]).loss.backward()
    compiled_grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(images, plans[0]).loss.backward()
    torch.testing.assert_close(compiled_grads, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("throw", [0.0, 0.5])
@pytest.mark.parametrize("name", METHODS)
def test_forward_and_backward_need_no_data(name: str, throw: float) -> None:
    """Fake tensors have shapes only: any look at a value, such as boolean indexing, raises."""
    config, size, _ = METHODS[name]
    _, images, plans = job(name, throw)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        model = config.build(size, PartialConfig(), throw > 0)
        plan = plans[0]._map(mode.from_tensor)
        output = model(mode.from_tensor(images), plan)
        output.loss.backward()
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            output.loss.item()
        assert output.prediction.shape[:2] == plan.mask().shape
        assert output.ids.shape == plan.masked.shape
