"""The catalogue: every published row has its recipe, with the published settings; costs, links and the page agree."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from ummim.__main__ import main
from ummim.capacity.gpus import Assumptions, find_gpu
from ummim.capacity.report import Cluster, report
from ummim.catalogue import (
    COSTS,
    REHEARSED,
    REPRODUCED,
    catalogue,
    encoders_of,
    evaluations,
    fine_tuned,
    linked,
    pre_trainings,
    read_status,
    record,
)
from ummim.errors import UserError
from ummim.recipe_file import load_recipe, packaged_evaluations, packaged_recipes
from ummim.recipe_list import markdown

# The tables of both papers and of the methods' own: recipe -> top-1 after fine-tuning.
PUBLISHED = {
    # UM-MAE, its repository
    "um_random_mae_vit_base_200e": 82.88, "um_mae_vit_base_200e": 82.88, "um_simmim_pvt_small_200e": 79.28,
    "um_mae_pvt_small_200e": 79.31, "um_simmim_swin_tiny_200e": 82.20, "um_mae_swin_tiny_200e": 82.04,
    "um_mae_swin_large_800e": 85.2,
    # PR-MIM, table 2: plain, progressive reconstruction, furthest sampling, both
    "mae_vit_base_100e": 81.7,
    "plain_mae_vit_base_100e_r25": 81.4, "progressive_mae_vit_base_100e_r25": 81.7,
    "furthest_mae_vit_base_100e_r25": 81.6, "pr_mae_vit_base_100e_r25": 81.7,
    "plain_mae_vit_base_100e": 81.1, "progressive_mae_vit_base_100e": 81.6,
    "furthest_mae_vit_base_100e": 81.4, "pr_mae_vit_base_100e": 81.8,
    "plain_mae_vit_base_100e_r65": 80.3, "progressive_mae_vit_base_100e_r65": 81.5,
    "furthest_mae_vit_base_100e_r65": 80.4, "pr_mae_vit_base_100e_r65": 81.7,
    # table 3
    "mae_vit_base_300e": 82.7, "plain_mae_vit_base_300e": 82.3, "pr_mae_vit_base_300e": 82.7,
    "mae_vit_base_800e": 83.3, "plain_mae_vit_base_800e": 83.0, "pr_mae_vit_base_800e": 83.3,
    "mae_vit_large_100e": 83.3, "plain_mae_vit_large_100e": 82.4, "pr_mae_vit_large_100e": 83.2,
    "mae_vit_large_800e": 85.4, "pr_mae_vit_large_800e": 85.4,
    # table 4
    "simmim_vit_base_100e": 81.6, "plain_simmim_vit_base_100e": 81.0, "pr_simmim_vit_base_100e": 81.7,
    "simmim_vit_base_800e": 83.8, "pr_simmim_vit_base_800e": 83.8,
    "local_mim_vit_base_100e": 83.3, "plain_local_mim_vit_base_100e": 82.9, "pr_local_mim_vit_base_100e": 83.3,
    "mff_vit_base_800e": 83.6, "plain_mff_vit_base_800e": 83.3, "pr_mff_vit_base_800e": 83.8,
    "tec_vit_base_300e": 84.8, "plain_tec_vit_base_300e": 84.5, "pr_tec_vit_base_300e": 84.7,
    # table 5
    "green_mim_swin_base_100e": 83.2, "plain_green_mim_swin_base_100e": 82.9, "pr_green_mim_swin_base_100e": 83.3,
    "green_mim_swin_large_100e": 83.8, "plain_green_mim_swin_large_100e": 83.1, "pr_green_mim_swin_large_100e": 83.9,
    # table 6
    "amt_mae_vit_base_400e": 82.8, "pr_mae_vit_base_400e": 83.0, "amt_simmim_vit_base_200e": 80.7,
    "pr_simmim_vit_base_100e_r30": 81.7,
    # the methods' own
    "simmim_swin_base_100e": 83.5, "simmim_swin_base_800e": 84.0, "simmim_swin_large_800e": 85.4,
    "green_mim_swin_large_800e": 85.1, "local_mim_vit_base_1600e": 84.0, "local_mim_vit_large_800e": 85.8,
    "local_mim_swin_base_400e": 84.1, "mff_vit_base_300e": 83.0, "tec_vit_base_mae_teacher_300e": 84.7,
}  # fmt: skip
OURS = {"quickstart", "green_mim_swin_base_200e", "simmim_swin_tiny_200e", "um_mae_swin_base_200e"}  # no such row

# Beginning of a name, the longest that fits -> pixels, batch, peak rate, betas, warm-up epochs, last rate, smallest
# crop, clipping. The official pre-trainings.
MAE = (224, 4096, 2.4e-3, (0.9, 0.95), 40, 0, 0.2, 0)
SIMMIM = (224, 2048, 4e-4, (0.9, 0.999), 10, 0, 0.67, 5)
UM = (256, 4096, 2.4e-3, (0.9, 0.95), 10, 0, 0.2, 0)
SETTINGS = {
    "mae": MAE, "mff": MAE, "tec": MAE, "amt_mae": MAE,
    "simmim_vit_base_800e": SIMMIM,
    "simmim_vit_base_100e": (224, 2048, 8e-4, (0.9, 0.999), 10, 4e-5, 0.67, 5),
    "simmim_swin": (192, 2048, 4e-4, (0.9, 0.999), 10, 0, 0.67, 5),
    "simmim_swin_base_100e": (192, 2048, 8e-4, (0.9, 0.999), 10, 4e-5, 0.67, 5),
    "simmim_swin_tiny_200e": (192, 2048, 8e-4, (0.9, 0.999), 10, 4e-5, 0.67, 5),
    "amt_simmim": (224, 2048, 4e-4, (0.9, 0.999), 10, 2e-5, 0.67, 5),
    "um": UM, "um_mae_vit": (224, *UM[1:]), "um_random_mae_vit": (224, *UM[1:]),
    "um_mae_swin_large": (256, 4096, 2.4e-3, (0.9, 0.95), 40, 0, 0.2, 0),
    "green_mim_swin_base": MAE, "green_mim_swin_large": (224, 2048, 8e-4, (0.9, 0.95), 40, 0, 0.2, 0),
    "local_mim_vit_base_1600e": (224, 2048, 1.6e-3, (0.9, 0.95), 40, 1e-6, 0.2, 0),
    "local_mim_vit_base_100e": (224, 2048, 1.6e-3, (0.9, 0.95), 10, 1e-6, 0.2, 0),
    "local_mim_vit_large": (224, 4096, 2.4e-3, (0.9, 0.95), 40, 1e-6, 0.2, 0),
    "local_mim_swin_base": (224, 2048, 8e-4, (0.9, 0.95), 40, 0, 0.2, 0),
}  # fmt: skip


def test_every_published_row_has_its_recipe_and_no_recipe_a_figure_of_its_own() -> None:
    entries = {entry.recipe: entry for entry in catalogue() if not entry.evaluation}
    assert {name for name, entry in entries.items() if entry.top1 is None} == OURS
    assert {name: entry.top1 for name, entry in entries.items() if name not in OURS} == PUBLISHED
    assert all(entry.source for name, entry in entries.items() if name not in OURS)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_recipe_has_the_published_settings(name: str) -> None:
    recipe, stem = next(recipe for recipe in pre_trainings() if recipe.name == name), name
    for start in ("plain_", "pr_", "furthest_", "progressive_"):
        stem = stem.removeprefix(start)
    expected = SETTINGS[max((key for key in SETTINGS if stem.startswith(key)), key=len)]
    optim, data = recipe.optim, recipe.data
    peak = optim.base_lr * recipe.global_batch / optim.reference_batch
    smallest = 0.2 if data.crop == "padded" else data.crop_scale[0]
    found: Any = (data.image_size, recipe.global_batch, pytest.approx(peak), optim.betas)
    found += (optim.warmup_epochs, optim.min_lr, smallest, optim.clip_grad)
    assert expected == found
    assert optim.weight_decay == 0.05
    assert f"_{recipe.epochs}e" in name
    assert recipe.throw_ratio == (0 if stem == name else int(name.partition("_r")[2] or 50) / 100)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_recipes_comment_names_its_table_and_the_source_of_its_hyper_parameters(name: str) -> None:
    """A baseline names the papers; what throws tokens names its table and the baseline that it is run as."""
    text = (ROOT / "ummim" / "recipes" / f"{name}.yaml").read_text()
    comment = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    assert "Source:" in comment
    if name.startswith(("plain_", "pr_", "furthest_", "progressive_")):
        assert re.search(r"PR-MIM\b.*table \d", comment)
        assert "yper-parameters" in comment
        stated = re.search(r"those of (\w+), ", comment)
        assert stated is None or stated[1] in PUBLISHED


def test_every_link_leads_to_an_evaluation_of_such_an_encoder() -> None:
    named = {evaluation.name: evaluation for evaluation in evaluations()}
    for recipe in pre_trainings():
        if recipe.name != "quickstart":
            kind = recipe.method.encoder.kind  # type: ignore[attr-defined]
            assert kind in {encoder.kind for encoder in encoders_of(named[linked(recipe)])}, recipe.name
    assert "pr_mae_vit_base_100e" in {recipe.name for recipe in fine_tuned("finetune_mae_vit_base_800e")}


def test_what_was_rehearsed_is_packaged_and_nothing_was_reproduced() -> None:
    for name, told in read_status().items():
        assert name in [*packaged_recipes(), *packaged_evaluations()]
        assert told["status"] == REHEARSED
        assert told.keys() == {"status", "version", "commit", "date"}


def test_a_pass_is_noted_and_never_lowers_a_status(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text(json.dumps({"quickstart": {"status": REPRODUCED}}))
    record("quickstart", "abc", path)
    record("mae_vit_base_800e", "abc", path)
    noted = json.loads(path.read_text())
    assert noted["quickstart"] == {"status": REPRODUCED}
    assert (noted["mae_vit_base_800e"]["status"], noted["mae_vit_base_800e"]["commit"]) == (REHEARSED, "abc")
    with pytest.raises(UserError, match="no packaged recipe"):
        record("mine.yaml", "abc", path)


@pytest.mark.usefixtures("plain_linear")
def test_days_and_hours_are_those_of_capacity() -> None:
    cluster = Cluster(2, 4, find_gpu("H100", None, None, None), Assumptions())
    (entry,) = (entry for entry in catalogue(cluster) if entry.recipe == "quickstart")
    run = report(load_recipe("quickstart"), cluster, asynchronous=True)["run"]
    assert [entry.days, entry.gpu_hours] == pytest.approx([run["days"], run["gpu_hours"]])
    assert entry.days


def test_an_evaluations_hours_are_of_what_it_trains() -> None:
    cluster = Cluster(1, 8, find_gpu("A100-80", None, None, None), Assumptions())
    entries = {entry.recipe: entry for entry in catalogue(cluster) if entry.evaluation}
    name = "finetune_mae_vit_base_800e"
    flops = json.loads(COSTS.read_text())[name]["step"]["activations"]["flops"]
    computing = 100 * 1_281_167 * flops / (312e12 * Assumptions().efficiency) / 3600
    assert computing < (entries[name].gpu_hours or 0) < 1.2 * computing
    per_epoch = {n: entry.gpu_hours / entry.epochs for n, entry in entries.items() if entry.gpu_hours}
    assert 2.5 < per_epoch[name] / per_epoch["linear_mae_vit_base_800e"] < 3.2
    assert 0 < (entries["knn_probe"].gpu_hours or 0) < 5
    assert all(entry.gpu_hours or entry.refused for entry in entries.values())


def test_a_recipe_that_a_cluster_refuses_says_why() -> None:
    cluster = Cluster(3, 8, find_gpu("V100", None, None, None), Assumptions())
    (entry,) = (entry for entry in catalogue(cluster) if entry.recipe == "mae_vit_base_800e")
    assert entry.days is None
    assert "24 ranks do not divide it" in entry.refused
    alone = Cluster(1, 8, find_gpu("V100", None, None, None), Assumptions())
    (entry,) = (entry for entry in catalogue(alone) if entry.recipe == "mae_vit_base_800e")
    assert "a V100 cannot; use fp16" in entry.refused


def test_the_page_is_what_is_written_now() -> None:
    assert (ROOT / "docs/recipes.md").read_text() == markdown(catalogue()) + "\n", (
        "ummim recipes --markdown > docs/recipes.md"
    )


def test_the_command_prints_two_tables_costs_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--gpu", "H100", "--nodes", "16"]) == 0
    printed = capsys.readouterr().out
    for text in ("Pre-trainings (", "Evaluations (", "GPU hours", "16 x 8 H100", "quickstart: global_batch = 8"):
        assert text in printed
    assert main(["recipes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["recipe"] for entry in found] == [*packaged_recipes(), *packaged_evaluations()]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--nodes", "4"], "name the GPU too"),
        (["--gpu", "H1000"], "known are"),
        (["--gpu", "H100", "--nodes", "0"], "give at least 1"),
    ],
)
def test_a_cluster_that_cannot_be_is_one_message(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", *arguments]) == 2
    assert part in capsys.readouterr().err
