"""A recipe's arithmetic."""

import pytest

from ummim.errors import RecipeError
from ummim.recipe_file import load_recipe

IMAGENET = 1_281_167


@pytest.mark.parametrize("world_size", [1, 8, 64, 256])
def test_learning_rate_and_steps_do_not_depend_on_the_world_size(world_size: int):
    plan = load_recipe("mae_vit_base_800e").plan(world_size, IMAGENET)
    assert plan.lr == pytest.approx(2.4e-3)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (312, 249_600, 12_480)
    assert plan.micro_batch * plan.accumulation * world_size == 4096
    assert plan.micro_batch <= 128


def test_max_steps_stops_early_and_keeps_the_schedule():
    plan = load_recipe("mae_vit_base_800e", ["max_steps=10"]).plan(8, IMAGENET)
    assert (plan.stop_step, plan.total_steps) == (10, 249_600)


def test_world_size_that_does_not_divide_the_batch_is_one_clear_error():
    with pytest.raises(RecipeError, match="global_batch = 4096: 3 ranks do not divide it: use 4095 or 4098"):
        load_recipe("mae_vit_base_800e").plan(3, IMAGENET)


@pytest.mark.parametrize(("limit", "micro"), [(512, 512), (511, 256), (100, 64), (1, 1)])
def test_micro_batch_is_the_largest_divisor_within_the_limit(limit: int, micro: int):
    plan = load_recipe("mae_vit_base_800e", [f"micro_batch={limit}"]).plan(8, IMAGENET)
    assert (plan.micro_batch, plan.accumulation) == (micro, 512 // micro)


def test_batch_larger_than_the_data_is_one_clear_error():
    with pytest.raises(RecipeError, match="global_batch = 4096: .*only 100 images"):
        load_recipe("mae_vit_base_800e").plan(1, 100)


@pytest.mark.parametrize("seconds", ["0.5", "-1", ".inf", ".nan"])
def test_a_watchdog_that_could_only_be_wrong_is_refused(seconds: str):
    with pytest.raises(RecipeError, match="must be at least 1, or 0 for no watchdog") as caught:
        load_recipe("mae_vit_base_800e", [f"hang_seconds={seconds}"])
    assert "hang_seconds" in str(caught.value)


def test_a_watchdog_may_be_short_or_none():
    for seconds in (0, 1):
        assert load_recipe("mae_vit_base_800e", [f"hang_seconds={seconds}"]).hang_seconds == seconds
    assert load_recipe("mae_vit_base_800e").hang_seconds == 40
