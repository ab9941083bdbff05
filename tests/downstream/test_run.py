"""Fine-tuning and probing as a whole: strategies, interruptions, every image once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import main as data_prep
from tests import forked
from tests.conftest import ROOT, TINY_MAE
from tests.downstream.labelled import build_shards, write_recipe
from tests.test_command_line import make_run
from ummim.__main__ import main
from ummim.downstream.imagenet_variants import imagenet_classes

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
PRE_TRAINED = (  # at another image size: a position table that is fixed, and none that one would make afresh
    "classify.weights=WEIGHTS",
    "classify.encoder=null",
    "classify.train_positions=false",
    "max_steps=4",
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
    "bf16": (*EMA, "precision=bf16"),
    "partial 2": ("classify.protocol=partial", "classify.last_blocks=1", "max_steps=4"),
    "partial 3": ("classify.protocol=partial", "classify.last_blocks=1", "max_steps=4", "zero_stage=3"),
    "attentive 3": (*FROZEN, "classify.protocol=attentive", "max_steps=4", "zero_stage=3"),
    "attentive 0": (*FROZEN, "classify.protocol=attentive", "max_steps=4", "zero_stage=0"),
    "lars": LARS,
    "lars, cut": (*LARS, "stop=1"),
    "lars, cut, resumed": LARS,
    "pre-trained": PRE_TRAINED,
    "pre-trained, cut": (*PRE_TRAINED, "stop=1"),
    "pre-trained, cut, resumed": (*PRE_TRAINED, "delete=WEIGHTS"),
    "knn": (*FROZEN, "classify.protocol=knn", "classify.neighbours=3"),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_shards(tmp_path_factory.mktemp("labelled"))
    return write_recipe(folder, folder / "run")


@pytest.fixture(scope="module")
def results(recipe: Path) -> dict[str, Any]:
    """Every case on two ranks."""
    weights = recipe.parent / "encoder.safetensors"
    export_encoder(weights)
    cases = [
        [str(recipe), f"output={recipe.parent / name.split(', resumed')[0]}"]
        + [word.replace("WEIGHTS", str(weights)) for word in words]
        for name, words in CASES.items()
    ]
    file = recipe.parent / "cases.json"
    file.write_text(json.dumps(cases))
    ends = forked.run_ranks(2, ["-m", "tests.downstream.evaluations", file], ROOT)
    assert [end.returncode for end in ends] == [0, 0], ends[0].stderr + ends[1].stderr
    lines = [json.loads(line) for line in ends[0].stdout.splitlines() if line.startswith("{")]
    return dict(zip(CASES, lines, strict=True))


def export_encoder(path: Path) -> None:
    """What ``ummim export`` writes of a pre-training's run on larger images."""
    recipe = path.parent / "mae.yaml"
    recipe.write_text(TINY_MAE.replace("image_size: 32", "image_size: 64"))
    run = make_run(recipe, path.parent / "mae")
    assert main(["export", str(run), str(path)]) == 0


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


def test_bf16_trains_and_is_evaluated_close_to_fp32(results: dict[str, Any]) -> None:
    found, expected = (results[name]["metrics"] for name in ("bf16", "zero 2"))
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=2e-2)
    assert found[-1]["loss"] != expected[-1]["loss"]
    for key in ("val_loss", "val_ema_loss"):
        assert found[-1][key] == pytest.approx(expected[-1][key], rel=2e-2)


@pytest.mark.parametrize("pair", [("partial 2", "partial 3"), ("attentive 0", "attentive 3")])
def test_what_is_frozen_trains_under_zero_3_as_elsewhere(pair: tuple[str, str], results: dict[str, Any]) -> None:
    one, other = (results[name]["metrics"] for name in pair)
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in other], rel=1e-4)
    assert one[-1]["val_loss"] == pytest.approx(other[-1]["val_loss"], rel=1e-4)
    assert one[0]["loss"] != one[-1]["loss"]


def test_lars_and_batch_statistics_survive_an_interruption(results: dict[str, Any]) -> None:
    assert results["lars, cut"]["code"] == 143
    assert comparable(results["lars, cut, resumed"]) == comparable(results["lars"])


def test_a_run_goes_on_without_the_weights_that_it_started_from(results: dict[str, Any], recipe: Path) -> None:
    cut, resumed, whole = (results[f"pre-trained{more}"] for more in (", cut", ", cut, resumed", ""))
    assert (cut["code"], resumed["code"]) == (143, 0)
    assert not (recipe.parent / "encoder.safetensors").exists()
    assert comparable(resumed) == comparable(whole)
    told = [
        json.loads((recipe.parent / name / "weights.json").read_text()) for name in ("pre-trained", "pre-trained, cut")
    ]
    assert told[0] == told[1]
    assert told[0]["resized"] == ["pos_embed"]
    evaluation = results["whole"]["evaluation"]
    assert evaluation["loss"] != whole["evaluation"]["loss"]


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


def test_a_set_of_other_classes_is_not_evaluated(results: dict[str, Any], recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(recipe.parent / "val-pictures" / "red", tmp_path / "pictures" / "red")
    assert data_prep(["build", str(tmp_path / "pictures"), str(tmp_path / "red"), "--workers", "1"]) == 0
    words = ["-m", "ummim", "evaluate", recipe.parent / "whole", "--shards", tmp_path / "red"]
    ends = forked.run_ranks(2, words, ROOT)
    assert [end.returncode for end in ends] == [2, 2]
    told = "".join(end.stderr for end in ends)
    assert told.count("has other classes than") == 1 and "Traceback" not in told


def test_robustness_counts_every_image_once_on_any_number_of_ranks(
    results: dict[str, Any], recipe: Path, tmp_path: Path
) -> None:
    """21 images in batches of 4: the same file to the byte, and what the fine-tuning itself had found."""
    classes = imagenet_classes()[:3]
    (tmp_path / "classes.txt").write_text("\n".join(classes))
    for colour, name in zip(("blue", "green", "red"), classes, strict=True):
        shutil.copytree(recipe.parent / "val-pictures" / colour, tmp_path / "val" / name)
    words = ["-m", "ummim", "robustness", recipe.parent / "whole", "--classes", tmp_path / "classes.txt"]
    words += ["--val", tmp_path / "val", "--batch", "4", "--workers", "0"]
    evaluation, written = results["whole"]["evaluation"], []
    for ranks, ema in ((1, True), (3, True), (2, False)):
        out = tmp_path / f"{ranks}.json"
        ends = forked.run_ranks(ranks, [*words, *["--ema"] * ema, "--json", out], ROOT)
        assert all(end.returncode == 0 for end in ends), ends[0].stderr
        assert [end.stdout.count("top-1") for end in ends] == [1] + [0] * (ranks - 1)
        written.append(out.read_text())
        found, expected = json.loads(written[-1]), evaluation["ema"] if ema else evaluation
        assert found["model"]["weights"] == ("average" if ema else "trained")
        for key in ("images", "top1", "top5"):
            assert found["sets"]["val"][key] == expected[key]
        assert found["sets"]["val"]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert written[0] == written[1] != written[2]

    (tmp_path / "val" / classes[2] / "zz.png").write_bytes(b"half a picture")  # the last image: the second rank's
    ends = forked.run_ranks(2, words, ROOT)
    assert [end.returncode for end in ends] == [2, 2]
    told = "".join(end.stderr for end in ends)
    assert told.count("cannot be read") == 1 and "zz.png" in told and "Traceback" not in told
