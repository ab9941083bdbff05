"""Effective rank and attention distance against values known beforehand and a plain computation."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.data.pictures import write_tree
from tests.methods.tiny import METHODS
from tests.report.conftest import MakeRun
from ummim.backbones.relative_vit import RelativeViT
from ummim.backbones.vit import ViT
from ummim.data import Batch, ShardIndex
from ummim.masking import PlanSampler
from ummim.methods.api import Method
from ummim.nn.aggregation import PartialConfig
from ummim.recipe_file import load_recipe
from ummim.report.health import (
    CHECKPOINTS,
    IMAGES,
    attention_distances,
    effective_rank,
    fixed_images,
    look,
    looked_into,
    patch_distances,
    probe,
)
from ummim.report.read import read_run


def batch_for(name: str) -> tuple[Method, Batch]:
    """A tiny method of ``METHODS``, and two images with masks of its kind."""
    tiny = METHODS[name]
    torch.manual_seed(0)
    method = tiny.config.for_inference().build(tiny.image_size, PartialConfig(), False).eval()
    sampler = PlanSampler(tiny.config.mask_grid(tiny.image_size), tiny.mask)
    images = torch.randint(0, 256, (2, 3, tiny.image_size, tiny.image_size), dtype=torch.uint8)
    return method, Batch(images, sampler.stack([sampler(1), sampler(1)]), torch.zeros(2, dtype=torch.int64), ["a", "b"])


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_effective_rank_counts_directions_of_equal_strength(rank: int) -> None:
    directions = torch.linalg.qr(torch.randn(16, 16))[0][:rank]
    assert effective_rank(directions.repeat(20, 1)) == pytest.approx(rank, rel=1e-3)


def test_effective_rank_is_the_entropy_of_the_singular_values() -> None:
    features = torch.randn(50, 8) @ torch.diag(torch.arange(8.0))
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + 1e-7
    assert effective_rank(features) == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-5)


def test_effective_rank_of_nothing_is_not_a_number() -> None:
    assert math.isnan(effective_rank(torch.zeros(4, 3)))
    assert math.isnan(effective_rank(torch.full((4, 3), math.inf)))


def test_attention_to_oneself_has_no_distance_and_to_the_neighbour_a_patch() -> None:
    assert attention_distances(torch.eye(6), (2, 3), 16) == 0
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert attention_distances(swap, (1, 2), 16) == pytest.approx(16)
    assert attention_distances(0.1 * swap, (1, 2), 16) == pytest.approx(16)  # the rest goes to the class token
    assert patch_distances((2, 2), 8)[0, 3] == pytest.approx(8 * 2**0.5)


def test_heads_distances_are_those_of_timms_own_attention() -> None:
    method, batch = batch_for("mff")
    assert isinstance(method.encoder, ViT)
    seen: list[Tensor] = []
    for block in method.encoder.blocks:
        block.attn.fused_attn = False  # type: ignore[union-attr]
        block.attn.attn_drop.register_forward_hook(lambda _m, _i, output: seen.append(output))  # type: ignore[union-attr]
    _, widths, heads = probe(method, batch)
    expected = [attention_distances(each[..., 1:, 1:], method.grid, 4).mean(0).tolist() for each in seen]
    assert len(expected) == 3
    for ours, plain in zip(heads, expected, strict=True):
        assert ours == pytest.approx(plain, rel=1e-4)
    assert widths == [24, 24, 24]


def test_a_position_bias_counts_as_attention() -> None:
    method, batch = batch_for("simmim")
    assert isinstance(method.encoder, RelativeViT) and method.encoder.rel_pos_bias is not None
    _, _, before = probe(method, batch)
    table = method.encoder.rel_pos_bias.relative_position_bias_table
    h, w = method.grid
    with torch.no_grad():
        table[(h - 1) * (2 * w - 1) + w - 1] = 50.0  # the offset from a patch to itself
    _, _, after = probe(method, batch)
    assert min(min(block) for block in before) > 1
    assert max(max(block) for block in after) < 1e-3


@pytest.mark.parametrize("name", [name for name in METHODS if name != "tec"])
def test_every_encoder_can_be_looked_into(name: str) -> None:
    method, batch = batch_for(name)
    hooks = sum(len(module._forward_hooks) for module in method.modules())
    ranks, widths, heads = probe(method, batch)
    assert len(ranks) == len(widths) >= 1
    assert all(1 <= rank <= width for rank, width in zip(ranks, widths, strict=True))
    assert len(heads) == (len(ranks) if isinstance(method.encoder, (ViT, RelativeViT)) else 0)
    assert sum(len(module._forward_hooks) for module in method.modules()) == hooks  # left as it was


def test_images_come_from_the_package_where_the_shards_are_gone(make_run: MakeRun) -> None:
    recipe = load_recipe(str(make_run() / "recipe.yaml"))
    batch, source = fixed_images(recipe, "d1")
    assert batch.images.shape == (IMAGES, 3, 32, 32)
    assert "packaged" in source and "gone" in source
    assert len({key.rpartition("-")[0] for key in batch.keys}) == 9  # of every kind
    again, _ = fixed_images(recipe, "d1", "http://nowhere.invalid/shards")
    assert torch.equal(again.images, batch.images)


def test_images_are_the_runs_own_where_its_shards_are_those_it_has_read(make_run: MakeRun, tmp_path: Path) -> None:
    from data_prep.__main__ import main as data_prep

    tree, shards = write_tree(tmp_path / "images"), tmp_path / "shards"
    assert data_prep(["build", str(tree), str(shards), "--shard-count", "12", "--workers", "1"]) == 0
    recipe = load_recipe(str(make_run() / "recipe.yaml"))
    batch, source = fixed_images(recipe, ShardIndex.open(shards).digest, str(shards))
    assert source == str(shards)
    assert {key[:4] for key in batch.keys} == {"bird", "cat/"}
    _, source = fixed_images(recipe, "d1", str(shards))
    assert "packaged" in source and "not what the run has read" in source


def test_a_few_checkpoints_stand_for_many_and_broken_ones_for_none(make_run: MakeRun) -> None:
    folder = make_run(steps=tuple(range(8, 8 * 13, 8)))
    (folder / "checkpoints" / "step-96" / "manifest.json").unlink()
    steps = [each.step for each in looked_into(read_run(folder).checkpoints)]
    assert len(steps) == CHECKPOINTS
    assert (steps[0], steps[-1]) == (8, 88)


def test_a_checkpoint_is_looked_into_with_its_own_weights(make_run: MakeRun) -> None:
    folder = make_run()
    recipe = load_recipe(str(folder / "recipe.yaml"))
    batch, _ = fixed_images(recipe, None)
    found = look(read_run(folder).checkpoints[0], batch)
    assert (found.step, len(found.ranks), found.widths) == (8, 2, [32, 32])
    assert [len(block) for block in found.distances] == [2, 2]
    torch.manual_seed(0)
    method = recipe.method.build(32, recipe.partial, False).eval()
    assert found.ranks == probe(method, batch)[0]
