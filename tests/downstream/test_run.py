"""Fine-tuning and probing as a whole: strategies, interruptions, every image once."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.conftest import ROOT
from tests.downstream.labelled import build_shards, write_recipe

FROZEN = ("classify.layer_decay=1",)
RICH = ("classify.mixup=0.8", "classify.cutmix=1.0", "classify.label_smoothing=0.1", "classify.ema=0.9",
        "classify.drop_path=0.1", "data.randaugment=rand-m9-mstd0.5-inc1", "data.erasing=0.25")  # fmt: skip
EMA = ("classify.ema=0.9", "max_steps=5")
LARS = (
    *FROZEN,
    "classify.protocol=linear",
    "classify.pool=class",
    "optim.optimizer=lars",
    "optim.base_lr=1.0",
    "zero_stage=0",
)
CASES: dict[str, tuple[str, ...]] = {
    "whole": RICH,
    "cut": (*RICH, "stop=4"),  # the evaluation after the first epoch has 3 batches of weights, then 3 of the average
    "cut, resumed": (*RICH, "stop=3"),  # again, in the evaluation that is made up for
    "cut, resumed again": RICH,
    "zero 0": (*EMA, "zero_stage=0"),
    "zero 1": (*EMA, "zero_stage=1"),
    "zero 2": (*EMA, "zero_stage=2"),
    "zero 3": (*EMA, "zero_stage=3"),
    "partial 2": ("classify.protocol=partial", "classify.last_blocks=1", "max_steps=4"),
    "partial 3": ("classify.protocol=partial", "classify.last_blocks=1", "max_steps=4", "zero_stage=3"),
    "attentive 3": (*FROZEN, "classify.protocol=attentive", "max_steps=4", "zero_stage=3"),
    "attentive 0": (*FROZEN, "classify.protocol=attentive", "max_steps=4", "zero_stage=0"),
    "lars": LARS,
    "lars, cut": (*LARS, "stop=1"),
    "lars, cut, resumed": LARS,
    "knn": (*FROZEN, "classify.protocol=knn", "classify.neighbours=3"),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_shards(tmp_path_factory.mktemp("labelled"))
    return write_recipe(folder, folder / "run")


@pytest.fixture(scope="module")
def results(recipe: Path) -> dict[str, Any]:
    """Every case on two ranks."""
    cases = [
        [str(recipe), f"output={recipe.parent / name.split(', resumed')[0]}", *words] for name, words in CASES.items()
    ]
    file = recipe.parent / "cases.json"
    file.write_text(json.dumps(cases))
    ends = forked.run_ranks(2, ["-m", "tests.downstream.evaluations", file], ROOT)
    assert [end.returncode for end in ends] == [0, 0], ends[0].stderr + ends[1].stderr
    lines = [json.loads(line) for line in ends[0].stdout.splitlines() if line.startswith("{")]
    return dict(zip(CASES, lines, strict=True))


def comparable(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of metrics without what is measured."""
    measured = ("images_per_second", "data_wait", "peak_memory_mib")
    return [{key: value for key, value in line.items() if key not in measured} for line in result["metrics"]]


def test_an_evaluation_stands_in_the_line_of_every_epochs_last_step(results: dict[str, Any]) -> None:
    whole = results["whole"]
    assert whole["code"] == 0
    assert [line["step"] for line in whole["metrics"]] == [2, 3, 4, 6, 8, 9]
    assert [line["step"] for line in whole["metrics"] if "val_top1" in line] == [3, 6, 9]
    last, evaluation = whole["metrics"][-1], whole["evaluation"]
    assert (evaluation["images"], evaluation["step"], evaluation["epoch"]) == (21, 9, 3.0)
    assert last["val_top1"] == evaluation["top1"]
    assert last["val_ema_loss"] == evaluation["ema"]["loss"] != evaluation["loss"]


def test_a_signal_in_an_evaluation_saves_and_the_run_comes_to_the_same_end(results: dict[str, Any]) -> None:
    cut, resumed, again = (results[name] for name in ("cut", "cut, resumed", "cut, resumed again"))
    for stopped in (cut, resumed):
        assert stopped["code"] == 143
        assert [line["step"] for line in stopped["metrics"]] == [2, 3]
        assert stopped["evaluation"] is None
    assert again["code"] == 0
    assert comparable(again) == comparable(results["whole"])
    assert again["evaluation"] == results["whole"]["evaluation"] | {"recipe": again["evaluation"]["recipe"]}


def test_every_stage_of_zero_comes_to_the_same_weights_and_averages(results: dict[str, Any]) -> None:
    expected = results["zero 0"]
    assert expected["evaluation"]["step"] == 5  # the end of a run is evaluated, wherever it is
    for stage in (1, 2, 3):
        found = results[f"zero {stage}"]
        for line, other in zip(found["metrics"], expected["metrics"], strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        for key in ("val_loss", "val_ema_loss"):
            assert found["metrics"][-1][key] == pytest.approx(expected["metrics"][-1][key], rel=1e-4)


@pytest.mark.parametrize("pair", [("partial 2", "partial 3"), ("attentive 0", "attentive 3")])
def test_what_is_frozen_trains_under_zero_3_as_elsewhere(pair: tuple[str, str], results: dict[str, Any]) -> None:
    one, other = (results[name]["metrics"] for name in pair)
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in other], rel=1e-4)
    assert one[-1]["val_loss"] == pytest.approx(other[-1]["val_loss"], rel=1e-4)
    assert one[0]["loss"] != one[-1]["loss"]


def test_lars_and_batch_statistics_survive_an_interruption(results: dict[str, Any]) -> None:
    assert results["lars, cut"]["code"] == 143
    assert comparable(results["lars, cut, resumed"]) == comparable(results["lars"])


def test_neighbours_leave_an_evaluation_and_no_checkpoint(results: dict[str, Any], recipe: Path) -> None:
    found = results["knn"]
    assert (found["code"], found["metrics"], found["evaluation"]["images"]) == (0, [], 21)
    assert found["evaluation"]["loss"] is None
    assert not (recipe.parent / "knn" / "checkpoints").exists()


def test_every_image_counts_once_on_any_number_of_ranks(results: dict[str, Any], recipe: Path) -> None:
    """21 images in batches of 4 on 1, 2 and 4 ranks: to the last bit."""
    found = []
    for ranks in (1, 2, 4):
        words = ["-m", "ummim", "evaluate", recipe.parent / "whole", "--json"]
        ends = forked.run_ranks(ranks, words, ROOT)
        assert all(end.returncode == 0 for end in ends), ends[0].stderr
        found.append(json.loads(ends[0].stdout))
    assert found[0] == found[1] == found[2]
    assert found[0]["images"] == 21
    evaluation = results["whole"]["evaluation"]
    assert {key: found[0][key] for key in ("top1", "top5", "loss")} == {
        key: evaluation[key] for key in ("top1", "top5", "loss")
    }
