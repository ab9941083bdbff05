"""The task of an evaluation: groups of parameters, mixing, what is frozen; and the probes."""

from typing import Any

import numpy as np
import pytest
import torch
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.nn import functional as F

from ummim.backbones.vit import ViTConfig
from ummim.data.config import LabelledDataConfig
from ummim.data.labelled import LabelledBatch
from ummim.data.normalise import normalise
from ummim.downstream.evaluate import evaluating
from ummim.downstream.probe import BatchNorm, Probe
from ummim.downstream.recipe import ClassifyConfig, ClassifyRecipe
from ummim.downstream.task import Classification, build_model, encoder_from_scratch, resolved
from ummim.engine.optim import OptimConfig, build_optimizer, build_schedule
from ummim.errors import RecipeError, UserError
from ummim.recipe_file import load_recipe

VIT = ViTConfig(8, 32, 4, 2)


def task_of(**values: Any) -> Classification:
    config = ClassifyConfig(encoder=VIT, classes=5, val_shards="v", **values)
    recipe = ClassifyRecipe(classify=config, data=LabelledDataConfig("t", image_size=32))
    torch.manual_seed(0)
    return Classification(build_model(recipe, encoder_from_scratch(recipe)), config)


def batch(size: int = 4, mixing: str = "m") -> LabelledBatch:
    images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return LabelledBatch(images, torch.arange(size) % 5, [str(i) for i in range(size)], mixing)


def scales(task: Classification) -> dict[str, tuple[float, float]]:
    """Parameter -> the factor of its rate, and its weight decay."""
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    groups = task.parameter_groups(0.05)
    return {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize(
    ("name", "block", "expected"),
    [
        ("finetune_mae_vit_base_800e", "encoder.blocks.0.mlp.fc1.weight", (3.70e-3, 5.69e-3)),
        ("finetune_mae_vit_large_800e", "encoder.blocks.23.mlp.fc1.weight", (7.53e-4, 0.75)),
        ("finetune_simmim_swin_base_100e", "encoder.layers.1.downsample.reduction.weight", (0.9**13, 0.9**11)),
        ("finetune_um_mae_pvt_small_200e", "encoder.stages.3.blocks.2.mlp.fc1.weight", (0.85**17, 0.85)),
    ],
)
def test_rates_fall_from_the_head_to_the_embedding(name: str, block: str, expected: tuple[float, float]) -> None:
    shallow = ["classify.encoder.depths=[2,2,6,2]"] if "swin" in name else []
    recipe = load_recipe(name, shallow, ClassifyRecipe)
    with torch.device("meta"):
        task = Classification(build_model(recipe, encoder_from_scratch(recipe)), recipe.classify)
    found = scales(task)
    trained = {parameter for parameter, value in task.model.named_parameters() if value.requires_grad}
    assert found.keys() == trained
    embedding = next(key for key in found if "patch_embed" in key and key.endswith("weight"))
    assert (found[embedding][0], found[block][0]) == pytest.approx(expected, rel=1e-3)
    assert found["head.weight"] == (1.0, 0.05)
    assert found["head.bias"] == (1.0, 0.0)
    undecayed = ("pos_embed", "cls_token", "relative_position_bias_table", "bias")
    assert all(found[key][1] == 0 for key in found if key.endswith(undecayed))
    assert task.parameter_groups(0.05)[-1]["lr_scale"] == 1.0  # the last group's rate is the one that is logged


def test_without_decay_there_are_two_groups_and_the_schedule_scales_each_group() -> None:
    assert len(task_of().parameter_groups(0.05)) == 2
    task = task_of(layer_decay=0.5)
    optimizer = build_optimizer(task, OptimConfig())
    plan: Any = type("Plan", (), {"lr": 1.0, "warmup_steps": 0, "total_steps": 10, "global_batch": 4})
    build_schedule(optimizer, OptimConfig(min_lr=0.1), plan).step_update(0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5**n for n in range(6)}


def test_lars_trusts_matrices_and_leaves_biases_alone() -> None:
    optimizer = build_optimizer(task_of(protocol="linear"), OptimConfig(optimizer="lars", weight_decay=0.0))
    assert isinstance(optimizer, Lars)
    for group in optimizer.param_groups:
        assert group["always_adapt"] == (group["params"][0].ndim == 2)
        assert (group["momentum"], group["trust_coeff"], group["lr"]) == (0.9, 0.001, 0.0)


def test_mixing_follows_from_the_step_alone_and_leaves_the_generators() -> None:
    task = task_of(mixup=0.8, cutmix=1.0, label_smoothing=0.1).eval()
    nn.init.normal_(task.model.head.weight)  # type: ignore[arg-type]
    np.random.seed(5)
    first = task(batch(mixing="7 mixing 0 3")).loss
    state = np.random.random()
    np.random.seed(5)
    assert np.random.random() == state
    assert task(batch(mixing="7 mixing 0 3")).loss.equal(first)
    losses = {task(batch(mixing=f"7 mixing 0 {step}")).loss.item() for step in range(6)}
    assert len(losses) == 6
    images = batch().images.clone()
    task(again := batch())
    assert again.images.equal(images)  # mixed is a copy


def test_without_mixing_labels_are_smoothed_and_accuracy_is_told() -> None:
    task = task_of(label_smoothing=0.1).eval()
    nn.init.normal_(task.model.head.weight)  # type: ignore[arg-type]
    output, logits = task(batch()), task.logits(batch().images)
    target = F.one_hot(batch().labels, 5) * 0.9 + 0.1 / 5
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(output.loss, expected)
    assert output.metrics["train_top1"] == 100 * (logits.argmax(1) == batch().labels).float().mean()


def test_partial_trains_the_last_blocks_norm_and_head() -> None:
    task = task_of(protocol="partial", last_blocks=2, drop_path=0.5, layer_decay=0.5)
    trained = {name.split(".attn")[0].split(".mlp")[0] for name, p in task.model.named_parameters() if p.requires_grad}
    sections = {".".join(name.split(".")[:3]) for name in trained}
    above = {f"{section}.{leaf}" for section in ("fc_norm", "head") for leaf in ("weight", "bias")}
    assert sections == {"encoder.blocks.2", "encoder.blocks.3", *above}
    task.train()
    assert [block.training for block in task.blocks()] == [False, False, True, True]
    assert set(scales(task).values()) >= {(1.0, 0.05), (0.5, 0.05), (0.25, 0.05)}
    with pytest.raises(RecipeError, match="last_blocks = 5: the encoder has 4 blocks"):
        task_of(protocol="partial", last_blocks=5)


@pytest.mark.parametrize("protocol", ["linear", "attentive"])
def test_a_probe_trains_its_head_alone(protocol: Any) -> None:
    task = task_of(protocol=protocol)
    task.train()
    assert isinstance(task.model, Probe)
    assert not task.model.backbone.training
    assert task.model.head.training
    assert task.blocks() == []
    task(batch()).loss.backward()
    for name, parameter in task.model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("head."), name
    head: Any = task.model.head
    assert head[-1].weight.std().item() == pytest.approx(0.01, rel=0.3)
    with evaluating(task):
        assert not task.model.head.training
    assert task.model.head.training


def test_batch_normalisation_is_pytorchs_without_affine() -> None:
    ours, theirs = BatchNorm(6), nn.BatchNorm1d(6, eps=1e-6, affine=False)
    for step in range(3):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)) * 3 + 2
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_a_run_holds_the_encoder_that_it_started_from() -> None:
    shallow = ["classify.encoder.depths=[1,1,1,1]"]
    recipe = load_recipe("finetune_green_mim_swin_base_200e", shallow, ClassifyRecipe)
    with torch.device("meta"):
        encoder = encoder_from_scratch(recipe)
        for module in encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6  # GreenMIM's
        found = resolved(recipe, encoder)
        assert found.classify.norm_eps == 1e-6
        again = encoder_from_scratch(found)
    assert {module.eps for module in again.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}
    vit = load_recipe("finetune_mae_vit_base_800e", (), ClassifyRecipe)
    with pytest.raises(UserError, match=r"classify.encoder: the weights are of TableSwinConfig.*, not ViTConfig"):
        resolved(vit, encoder)


def test_images_are_normalised_once() -> None:
    task = task_of().eval()
    images: Tensor = batch().images
    torch.testing.assert_close(task.logits(images), task.model(normalise(images)))
