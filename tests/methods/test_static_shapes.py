"""The forward has static shapes and never looks at data: one graph, and no synchronisation with the device."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.methods.tiny import METHODS
from ummim.masking import MaskPlan, PlanSampler
from ummim.nn.aggregation import PartialConfig

ALTERNATIVES = [
    PartialConfig("none"),
    PartialConfig("pool", fill="residual"),
    PartialConfig("transformer", fill="all"),
    PartialConfig("convnext", after_norm=True),
]
CASES = [(name, throw) for name, tiny in METHODS.items() if tiny.static for throw in tiny.throw]


def job(
    name: str,
    throw: float,
    partial: PartialConfig = PartialConfig(),  # noqa: B008 (frozen)
) -> tuple[Any, torch.Tensor, list[MaskPlan]]:
    config, size = METHODS[name].config, METHODS[name].image_size
    torch.manual_seed(0)
    model = config.build(size, partial, throw > 0)
    sampler = PlanSampler(config.mask_grid(size), METHODS[name].mask, throw)
    plans = [sampler.stack([sampler(seed) for seed in (i, i + 1)]) for i in (0, 5)]
    return model, torch.randn(2, 3, size, size), plans


@pytest.mark.parametrize(("name", "throw"), CASES)
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


@pytest.mark.parametrize("partial", ALTERNATIVES, ids=str)
@pytest.mark.parametrize("name", ["mae", "local_mim"])
def test_every_aggregation_is_one_graph(name: str, partial: PartialConfig, fresh_compiler: None) -> None:
    model, images, plans = job(name, 0.5, partial)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for plan in plans:
            torch.testing.assert_close(compiled(images, plan).loss, model(images, plan).loss)
    compiled(images, plans[0]).loss.backward()


@pytest.mark.parametrize(("name", "throw"), CASES)
def test_forward_and_backward_need_no_data(name: str, throw: float) -> None:
    """Fake tensors have shapes only: any look at a value, such as boolean indexing, raises."""
    model, images, plans = job(name, throw)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        model._apply(mode.from_tensor)
        plan = plans[0]._map(mode.from_tensor)
        output = model(mode.from_tensor(images), plan)
        output.loss.backward()
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            output.loss.item()
        assert output.prediction.shape[:2] == plan.mask().shape
        assert output.ids.shape == plan.masked.shape
