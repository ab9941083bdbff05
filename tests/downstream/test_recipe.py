"""Evaluations as recipes: both kinds are told apart, and each mistake is one message."""

from pathlib import Path

import pytest

from tests.conftest import TINY_MAE
from tests.downstream.labelled import build_shards, write_recipe
from ummim.downstream.recipe import ClassifyRecipe
from ummim.downstream.run import open_sets
from ummim.errors import DataError, RecipeError
from ummim.recipe import Recipe
from ummim.recipe_file import dump_recipe, load_recipe, packaged_evaluations, packaged_recipes
from ummim.run_config import RunConfig


@pytest.mark.parametrize("name", packaged_evaluations())
def test_packaged_evaluation_loads_and_survives_its_own_dump(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, (), ClassifyRecipe)
    assert recipe.description
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(str(path), (), ClassifyRecipe) == recipe


def test_each_kind_is_listed_and_refused_where_the_other_is_needed() -> None:
    assert "finetune_mae_vit_base_800e" in packaged_evaluations()
    assert not set(packaged_evaluations()) & set(packaged_recipes())
    with pytest.raises(RecipeError, match="is an evaluation .*; this needs a pre-training recipe"):
        load_recipe("knn_probe")
    with pytest.raises(RecipeError, match="is a pre-training recipe .*; this needs an evaluation"):
        load_recipe("quickstart", (), ClassifyRecipe)
    assert isinstance(load_recipe("quickstart", (), RunConfig), Recipe)
    assert isinstance(load_recipe("knn_probe", (), RunConfig), ClassifyRecipe)


def test_a_childs_encoder_takes_the_place_of_its_bases() -> None:
    child = load_recipe("finetune_um_mae_pvt_small_200e", (), ClassifyRecipe)
    assert child.classify.encoder is not None
    assert child.classify.encoder.kind == "pvt"
    assert (child.classify.mixup, child.data.randaugment) == (0.8, "rand-m9-mstd0.5-inc1")
    assert load_recipe("knn_probe", ["classify.encoder=null"], ClassifyRecipe).classify.encoder is None


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("classify.protocol=half", ["classify.protocol = 'half'", "partial"]),
        ("classify.wieghts=x", ["classify.wieghts", "did you mean weights"]),
        ("classify.encoder.kind=resnet", ["classify.encoder.kind", "vit or relative_vit"]),
        ("classify.encoder.depths=[1,1,1,1]", ["unknown key of vit", "did you mean depth"]),
        ("classify.encoder=null", ["classify.weights", "or an encoder from scratch"]),
        ("classify.classes=0", ["classify.classes = 0", "at least 1"]),
        ("classify.last_blocks=2", ["classify.last_blocks = 2", "protocol: partial"]),
        ("classify.protocol=partial", ["classify.last_blocks", "at least 1"]),
        ("classify.protocol=linear", ["classify.layer_decay = 0.75", "frozen"]),
        ("classify.layer_decay=1.1", ["classify.layer_decay = 1.1", "at most 1"]),
        ("classify.ema=1", ["classify.ema = 1", "0.9999"]),
        ("classify.val_shards=", ["classify.val_shards = ''", "validation shards"]),
        ("classify=3", ["classify", "is a section"]),
        ("method.name=mae", ["not both"]),
        ("throw_ratio=0.5", ["throw_ratio", "unknown key"]),
        ("optim.optimizer=lars", ["optim.optimizer = 'lars'", "zero_stage to 0"]),
        ("optim.optimizer=sgd", ["optim.optimizer = 'sgd'", "lars"]),
        ("data.randaugment=rand-m9-tweights", ["data.randaugment", "rand-m9-mstd0.5-inc1"]),
    ],
)
def test_a_mistake_is_one_message(override: str, parts: list[str], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tmp_path / "run")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), [override], RunConfig)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_pre_training_knows_no_keys_of_an_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "mae.yaml"
    path.write_text(TINY_MAE)
    with pytest.raises(RecipeError, match=r"data.erasing.*unknown key"):
        load_recipe(str(path), ["data.erasing=0.25"])


def test_micro_batches_are_even_where_images_are_mixed(tmp_path: Path) -> None:
    path = str(write_recipe(tmp_path, tmp_path / "run"))
    words = ["global_batch=30", "micro_batch=5", "classify.mixup=0.8"]
    assert load_recipe(path, words[:2], ClassifyRecipe).plan(1, 100).micro_batch == 5
    assert load_recipe(path, words, ClassifyRecipe).plan(1, 100).micro_batch == 2
    with pytest.raises(RecipeError, match="global_batch = 30: mixup mixes pairs, and 15 images on a rank"):
        load_recipe(path, words, ClassifyRecipe).plan(2, 100)


def test_sets_that_do_not_fit_are_refused_before_training(tmp_path: Path) -> None:
    folder = build_shards(tmp_path / "a", train=9, val=3)
    path = str(write_recipe(folder, tmp_path / "run"))
    sets = open_sets(load_recipe(path, (), ClassifyRecipe))
    assert (len(sets.train), len(sets.val)) == (9, 3)
    other = build_shards(tmp_path / "b", train=2, val=1)  # one class and two
    for override, message in (
        ("classify.classes=2", "data.shards: .*labels up to 2: set classify.classes=3"),
        (f"classify.val_shards={other / 'train'}", r"other classes than .*\(in one alone: "),
        ("classify.val_shards=/nowhere/val", "classify.val_shards: /nowhere/val"),
    ):
        with pytest.raises(DataError, match=message):
            open_sets(load_recipe(path, [override], ClassifyRecipe))
