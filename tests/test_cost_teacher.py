"""``ummim cost`` of a method with a frozen teacher: what it adds in FLOPs and memory."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.multiply_adds import of_tec_student
from ummim.__main__ import main
from ummim.cost import SwapAttention, build_on_meta, cost, count_flops, meta_inputs, plain_attention
from ummim.recipe_file import load_recipe

pytestmark = pytest.mark.usefixtures("plain_linear")

TEC = """
method: {name: tec, teacher: {checkpoint: nowhere.pth}}
data: {shards: SHARDS, image_size: 224}
"""


@pytest.mark.parametrize("throw_ratio", [0, 0.5])
def test_forward_pass_of_tec_is_teacher_and_student(throw_ratio: float, write_recipe):
    recipe = load_recipe(str(write_recipe(TEC)), [f"throw_ratio={throw_ratio}"])
    method, inputs = build_on_meta(recipe), meta_inputs(recipe)
    both, _ = count_flops(method, *inputs)
    with SwapAttention(plain_attention), FlopCounterMode(display=False) as counter:
        method.get_submodule("teacher")(inputs[0], torch.bfloat16)
    student = (both - counter.get_total_flops()) / 2 / recipe.micro_batch
    assert student == pytest.approx(of_tec_student(recipe), rel=1e-6)
    counted = cost(recipe)
    assert counted.trainable_parameters == sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert counted.frozen_flops == counter.get_total_flops() / recipe.micro_batch


def test_a_frozen_teacher_is_counted_and_shown_apart(write_recipe, capsys: pytest.CaptureFixture[str]):
    def printed(*arguments: str) -> str:
        assert main(["cost", *arguments]) == 0
        return capsys.readouterr().out

    path = str(write_recipe(TEC))
    values = json.loads(printed(path, "--json"))
    vit_base = 85_798_656 - 2 * 768  # timm's, without head and final norm
    assert values["frozen_parameters"] == vit_base
    assert values["frozen_bytes"] == 4 * vit_base  # float32 under every precision
    assert values["parameters"] == values["trainable_parameters"] == 118_342_144
    assert "frozen teacher's parameters, M" in printed(path)
    assert cost(load_recipe("mae_vit_base_800e")).frozen_flops == 0
    assert "frozen" not in printed("mae_vit_base_800e")
