"""``ummim cost``: counts against closed forms, against real tensors, and as the command prints them."""

import json
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests import forked
from tests.conftest import ROOT, TINY_MAE, TINY_UM_MAE
from tests.multiply_adds import (
    block,
    of_green_mim,
    of_local_mim_vit,
    of_mae,
    of_mff,
    of_simmim_swin,
    of_simmim_vit,
    of_um_mae_pvt,
    of_um_mae_swin,
)
from ummim.__main__ import main
from ummim.cost import (
    SwapAttention,
    batch_of,
    build_on_meta,
    cost,
    count_flops,
    full_reconstruction,
    meta_inputs,
    plain_attention,
    report,
    saved_bytes,
)
from ummim.masking import sample_seed
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe

pytestmark = pytest.mark.usefixtures("plain_linear")


def forward_multiply_adds(recipe: Recipe) -> float:
    """Of an image: ``cost`` counts much more."""
    forward, _ = count_flops(build_on_meta(recipe), *meta_inputs(recipe))
    return forward / batch_of(recipe) / 2


PACKAGED = [
    (of_mae, "mae_vit_base_800e", "throw_ratio=0"),
    (of_mae, "mae_vit_base_800e", "throw_ratio=0.25"),
    (of_mae, "pr_mae_vit_base_800e", "partial.aggregation=none"),
    (of_mae, "pr_mae_vit_large_800e", "partial.kernel_size=5"),
    (of_mae, "um_mae_vit_base_200e", "throw_ratio=0.5"),
    (of_um_mae_swin, "um_mae_swin_tiny_200e", "throw_ratio=0"),
    (of_um_mae_swin, "um_mae_swin_tiny_200e", "throw_ratio=0.5"),
    (of_um_mae_swin, "um_mae_swin_large_800e", "throw_ratio=0.5"),
    (of_um_mae_pvt, "um_mae_pvt_small_200e", "throw_ratio=0"),
    (of_um_mae_pvt, "um_mae_pvt_small_200e", "throw_ratio=0.5"),
    (of_mff, "mff_vit_base_800e", "throw_ratio=0.5"),
]


@pytest.mark.parametrize(("by_hand", "name", "override"), PACKAGED)
def test_forward_pass_is_the_closed_form(by_hand: Callable[[Recipe], float], name: str, override: str):
    recipe = load_recipe(name, [override])
    assert forward_multiply_adds(recipe) == pytest.approx(by_hand(recipe), rel=1e-6)


SIMMIM_VIT = """
method: {name: simmim, encoder: {kind: relative_vit}}
mask: {ratio: 0.6, unit: 2}
data: {shards: SHARDS, image_size: 224}
"""
SIMMIM_SWIN = """
method: {name: simmim, encoder: {kind: swin, window_size: 6}}
mask: {ratio: 0.6}
data: {shards: SHARDS, image_size: 192}
"""
GREEN_MIM = """
method: {name: green_mim, encoder: {embed_dim: 64, depths: [2, 2, 4, 2], num_heads: [2, 4, 8, 16], window_size: 7}}
mask: {shared_by: 64}
data: {shards: SHARDS, image_size: 224}
"""
LOCAL_MIM = """
method: {name: local_mim}
data: {shards: SHARDS, image_size: 224}
"""


@pytest.mark.parametrize(
    ("by_hand", "text", "throw_ratio", "official"),
    [  # G multiply-adds of the papers' codes
        (of_simmim_vit, SIMMIM_VIT, 0, 17.679),
        (of_simmim_vit, SIMMIM_VIT, 0.5, 8.828),
        (of_simmim_swin, SIMMIM_SWIN, 0, None),
        (of_green_mim, GREEN_MIM, 0, None),
        (of_green_mim, GREEN_MIM, 0.5, None),
        (of_local_mim_vit, LOCAL_MIM, 0, 5.234),
        (of_local_mim_vit, LOCAL_MIM, 0.5, 4.876),
    ],
    ids=["simmim-0", "simmim-0.5", "simmim_swin", "green_mim-0", "green_mim-0.5", "local_mim-0", "local_mim-0.5"],
)
def test_forward_pass_of_other_methods(
    by_hand: Callable[[Recipe], float], text: str, throw_ratio: float, official: float | None, write_recipe
):
    recipe = load_recipe(str(write_recipe(text)), [f"throw_ratio={throw_ratio}"])
    counted = forward_multiply_adds(recipe)
    assert counted == pytest.approx(by_hand(recipe), rel=1e-6)
    assert official is None or 0.975 * official < counted / 1e9 < official


def test_masks_that_follow_attention_are_counted_beside_those_before():
    values = report(load_recipe("amt_mae_vit_base_400e"))
    assert values["baseline"]["forward_flops"] == cost(load_recipe("mae_vit_base_800e")).forward_flops
    tokens = 30 * 768**2 + 12 * block(31, 768) + 31 * 768 * 512 + 8 * block(1 + 30 + 88, 512) + 88 * 512 * 768
    assert values["forward_flops"] / 2 == pytest.approx(tokens, rel=1e-6)


def test_pr_mim_halves_simmim(write_recipe):
    assert report(load_recipe(str(write_recipe(SIMMIM_VIT)), ["throw_ratio=0.5"]))["flops_ratio"] <= 0.5


@pytest.mark.parametrize(
    ("name", "override", "extra", "official"),
    [  # G multiply-adds of the official codes (MAE: counted)
        ("mae_vit_base_800e", "throw_ratio=0", 147 * 768 * 768 + 50 * 512 * 768, 9.781133),
        ("mae_vit_large_800e", "throw_ratio=0", 147 * 768 * 1024 + 50 * 512 * 768, 20.755784),
        ("pr_mae_vit_base_800e", "throw_ratio=0.5", 147 * 768 * 768 + 50 * 512 * 768, 7.082),
        ("um_mae_swin_tiny_200e", "throw_ratio=0", 3072 * 48 * 96 + 64 * 512 * 768, 3.363),
        ("um_mae_swin_tiny_200e", "throw_ratio=0.5", 3072 * 48 * 96 + 64 * 512 * 768, 2.463),
        ("um_mae_swin_large_800e", "throw_ratio=0", 3072 * 48 * 192 + 64 * 512 * 768, 18.457),
    ],
)
def test_official_codes_count_more_because_they_compute_more(name: str, override: str, extra: float, official: float):
    """They embed the masked patches too, and predict the visible patches and the class token too."""
    counted = forward_multiply_adds(load_recipe(name, [override]))
    digits = len(str(official).partition(".")[2])
    assert (counted + extra) / 1e9 == pytest.approx(official, abs=0.6 * 10**-digits)


@pytest.mark.parametrize("name", ["pr_mae_vit_base_800e", "pr_local_mim_vit_base_100e", "pr_simmim_vit_base_100e"])
def test_an_aggregation_that_is_a_block_is_recomputed_with_the_others(name: str):
    kept = {}
    for kind in ("conv", "transformer"):
        recipe = load_recipe(name, [f"partial.aggregation={kind}", "activation_checkpointing=torch"])
        kept[kind] = cost(recipe).activation_bytes
    assert kept["transformer"] < 1.05 * kept["conv"]  # its input, as a convolution keeps it


def test_pr_mim_costs_what_the_paper_says():
    """72% of MAE ViT-B's forward pass at r = 50%, of which the depth-wise convolution is next to nothing."""
    values = report(load_recipe("pr_mae_vit_base_800e"))
    assert values["flops_ratio"] <= 0.725
    small = cost(load_recipe("pr_mae_vit_base_800e", ["partial.kernel_size=3"]))
    kernel = (values["forward_flops"] - small.forward_flops) * 49 / 40
    assert kernel == pytest.approx(2 * 196 * 512 * 49, rel=1e-3)
    assert kernel < 0.001 * values["forward_flops"]


def test_backward_pass_is_two_products_for_each_of_the_forward():
    """Except that images and the position MLP's coordinates want no gradient; grouped convolution included."""
    recipe = load_recipe("pr_mae_vit_base_800e")
    counted = cost(recipe)
    assert counted.training_flops == pytest.approx(3 * counted.forward_flops - 2 * 49 * 768 * 768, rel=1e-6)


def test_cost_for_an_image_does_not_depend_on_the_batch():
    small, large = (cost(load_recipe("mae_vit_base_800e", [f"micro_batch={b}", "global_batch=64"])) for b in (2, 64))
    assert small.forward_flops == large.forward_flops
    assert small.training_flops == large.training_flops
    assert small.activation_bytes == pytest.approx(large.activation_bytes, rel=1e-4)  # random states of the kernels


@pytest.mark.parametrize(
    ("precision", "checkpointing", "fused", "materialised"),
    [
        # Weights and activations of e bytes: two norms' inputs and statistics, qkv, attention's output, and the MLP's
        # three inputs: 16 e D bytes a token (Korthikanti et al. 2022: 34 D - 2 D of dropout masks for e = 2).
        ("bf16", "none", 50 * (32 * 768 + 16 + 4 * 12), 50 * (32 * 768 + 16 + 2 * 12 * 50)),
        ("fp32", "none", 50 * (64 * 768 + 16) + 4 * 12 * 64, 50 * (64 * 768 + 16 + 4 * 12 * 50)),  # rows of 32
        ("bf16", "torch", 50 * 2 * 768, None),
        ("bf16", "fairscale", 50 * 2 * 768, None),
    ],
)
def test_activations_of_a_block(precision: str, checkpointing: str, fused: int, materialised: int | None):
    def counted(depth: int):
        keys = [f"precision={precision}", f"activation_checkpointing={checkpointing}", f"method.encoder.depth={depth}"]
        return cost(load_recipe("mae_vit_base_800e", [*keys, "micro_batch=64"]))

    two, three = counted(2), counted(3)
    assert three.activation_bytes - two.activation_bytes == pytest.approx(fused, abs=2)
    if materialised is not None:
        bytes_more = three.activation_bytes_materialised - two.activation_bytes_materialised
        assert bytes_more == pytest.approx(materialised, abs=2)
        assert three.activation_bytes == three.activation_bytes_fused


@pytest.mark.parametrize("text", [TINY_MAE, TINY_UM_MAE], ids=["mae", "um_mae"])
def test_meta_tensors_keep_what_real_ones_keep(text: str, write_recipe):
    recipe = load_recipe(str(write_recipe(text)))
    method = recipe.method.build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)
    sampler, size = recipe.sampler(), recipe.data.image_size
    plan = sampler.stack([sampler(sample_seed(0, 0, str(i))) for i in range(recipe.micro_batch)])
    images = torch.randn(recipe.micro_batch, 3, size, size)
    given = [*method.parameters(), *method.buffers(), images, plan.visible, plan.secondary, plan.kept, plan.thrown]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with SwapAttention(plain_attention), saved_tensors_hooks(pack, lambda tensor: tensor):
        output = method(images, plan)  # keeps every saved tensor alive, so no address is used twice
    assert saved_bytes(build_on_meta(recipe), *meta_inputs(recipe), plain_attention) == sum(saved.values())
    del output


def test_counting_leaves_no_gradient_and_repeats(write_recipe):
    recipe = load_recipe(str(write_recipe(TINY_UM_MAE)))
    method, inputs = build_on_meta(recipe), meta_inputs(recipe)
    assert count_flops(method, *inputs) == count_flops(method, *inputs)
    assert all(parameter.grad is None for parameter in method.parameters())


def test_baseline_throws_nothing_and_aggregates_nothing(write_recipe):
    recipe = load_recipe(str(write_recipe(TINY_UM_MAE)))
    values = report(recipe)
    plain = load_recipe(str(write_recipe(TINY_UM_MAE)), ["throw_ratio=0"])
    assert full_reconstruction(recipe) == plain
    alone = report(plain)
    assert values["baseline"] == {key: alone[key] for key in values["baseline"]}
    assert values["parameters"] - values["baseline"]["parameters"] == 32 * 50  # the 7x7 depth-wise convolution
    for ratio, key in (
        ("flops_ratio", "forward_flops"),
        ("training_flops_ratio", "training_flops"),
        ("activation_bytes_ratio", "activation_bytes"),
    ):
        assert values[ratio] == values[key] / values["baseline"][key] < 1


def run(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["cost", *arguments]) == 0
    return capsys.readouterr().out


def test_json_has_the_documented_keys(write_recipe, capsys: pytest.CaptureFixture[str]):
    values = json.loads(run([str(write_recipe(TINY_UM_MAE)), "throw_ratio=0.25", "--json"], capsys))
    counts = [
        "parameters", "trainable_parameters", "forward_flops", "training_flops", "activation_bytes",
        "activation_bytes_fused", "activation_bytes_materialised", "frozen_parameters", "frozen_bytes", "frozen_flops",
    ]  # fmt: skip
    about = ["recipe", "throw_ratio", "image_size", "batch", "precision", "activation_checkpointing"]
    ratios = ["flops_ratio", "training_flops_ratio", "activation_bytes_ratio"]
    assert list(values) == [*about, *counts, "baseline", *ratios]
    assert list(values["baseline"]) == counts
    assert all(isinstance(values[key], int) and (values[key] > 0) != key.startswith("frozen_") for key in counts)
    assert (values["recipe"], values["throw_ratio"], values["batch"]) == ("tiny", 0.25, 8)
    documented = (ROOT / "docs" / "cost.md").read_text()
    assert all(f"`{key}`" in documented for key in [*values])


def test_text_shows_both_and_their_ratio(write_recipe, capsys: pytest.CaptureFixture[str]):
    printed = run([str(write_recipe(TINY_MAE)), "throw_ratio=0.5"], capsys)
    row = next(line for line in printed.splitlines() if line.startswith("forward, GFLOPs"))
    mine, full, ratio = map(float, row.split()[-3:])
    assert ratio == pytest.approx(mine / full, abs=0.2)  # printed to three decimals
    assert "throw_ratio=0.5" in printed


def test_documented_table_is_current():
    done = forked.run([ROOT / "benchmarks" / "cost_table.py", "mae_vit_base_800e"], ROOT)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    documented = (ROOT / "docs" / "cost.md").read_text().splitlines()
    assert len(printed) == 4
    assert set(printed) <= set(documented)


@pytest.mark.parametrize(
    ("arguments", "part"), [(["nope"], "no packaged recipe"), (["mae_vit_base_800e", "throw_ratio=0.9"], "throw_ratio")]
)
def test_users_mistake_is_one_line(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]):
    assert main(["cost", *arguments]) == 2
    printed = capsys.readouterr().err
    assert part in printed
    assert printed.count("\n") == 1
