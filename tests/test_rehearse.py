"""Rehearsals: every recipe's shrunk form trains, one recipe a day goes through all stages, and what fails is told."""

import datetime
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rehearsed import Forked
from ummim.__main__ import main
from ummim.catalogue import evaluations, pre_trainings
from ummim.downstream.recipe import ClassifyRecipe
from ummim.downstream.task import Classification, build_model, encoder_from_scratch
from ummim.errors import UserError
from ummim.masking import sample_seed
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe, packaged_evaluations, packaged_recipes
from ummim.rehearsal import processes, stages
from ummim.rehearsal.command import prepare, rehearse
from ummim.rehearsal.processes import Job, StageFailed
from ummim.rehearsal.shrink import CLASSES, overrides, shrink
from ummim.rehearsal.stages import Rehearsal
from ummim.run_config import RunConfig

RECIPES = {recipe.name: recipe for recipe in (*pre_trainings(), *evaluations())}


@cache
def shrunk(name: str) -> RunConfig:
    changes = {**shrink(RECIPES[name]).changes, "data.shards": "/nowhere"}
    return load_recipe(name, overrides(changes), RunConfig)


@cache
def learns(recipe: Recipe) -> bool:
    """One forward and backward pass on two images."""
    size = recipe.data.image_size
    method = recipe.method.build(size, recipe.partial, recipe.throw_ratio > 0)
    sampler = recipe.sampler()
    plan = sampler.stack([sampler(sample_seed(0, 0, "same" if recipe.mask.shared_by > 1 else str(i))) for i in (0, 1)])
    loss = method(torch.rand(2, 3, size, size), plan).loss
    loss.backward()
    return bool(loss.isfinite()) and all(p.grad is not None for p in method.encoder.parameters() if p.requires_grad)


def same(recipe: Recipe) -> Recipe:
    """Equal for recipes whose shrunk models compute the same."""
    named: dict[str, Any] = {"name": "", "description": "", "output": "", "finetune": "", "seed": 0, "epochs": 1}
    return replace(recipe, **named, optim=type(recipe.optim)())


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_shrunk_pre_training_takes_a_step(name: str) -> None:
    recipe = shrunk(name)
    assert isinstance(recipe, Recipe)
    assert learns(same(recipe))


@pytest.mark.parametrize("name", packaged_evaluations())
def test_a_shrunk_evaluation_classifies(name: str) -> None:
    recipe = shrunk(name)
    assert isinstance(recipe, ClassifyRecipe)
    model = build_model(recipe, encoder_from_scratch(recipe))
    if recipe.classify.protocol != "knn":
        images = torch.zeros(2, 3, recipe.data.image_size, recipe.data.image_size, dtype=torch.uint8)
        task = Classification(model, recipe.classify).eval()
        assert task.logits(images).shape == (2, CLASSES)


@pytest.mark.parametrize("name", [*packaged_recipes(), *packaged_evaluations()])
def test_what_makes_the_code_path_is_kept(name: str) -> None:
    before, after = RECIPES[name], shrunk(name)
    for key in ("zero_stage", "precision", "reduce_precision", "activation_checkpointing", "ds_config", "bad_steps"):
        assert getattr(before, key) == getattr(after, key)
    assert before.optim.schedule == after.optim.schedule
    peak = before.optim.base_lr * before.global_batch / before.optim.reference_batch
    assert after.plan(2, 54).lr == pytest.approx(peak)
    assert after.plan(2, 54).accumulation == (1 if "linear" in name else 2)
    if isinstance(before, Recipe) and isinstance(after, Recipe):
        assert type(before.method).__module__ == type(after.method).__module__
        assert replace(before.mask, shared_by=1) == replace(after.mask, shared_by=1)
        assert (before.mask.shared_by > 1) == (after.mask.shared_by > 1)
        assert (before.throw_ratio, before.partial) == (after.throw_ratio, after.partial)
    elif isinstance(before, ClassifyRecipe) and isinstance(after, ClassifyRecipe):
        assert before.classify.protocol == after.classify.protocol
        assert before.classify.layer_decay == after.classify.layer_decay


def test_what_is_shrunk_is_told_and_what_is_not_is_not() -> None:
    found = shrink(RECIPES["pr_simmim_vit_base_800e"])
    assert "method.encoder.depth 12 -> 4" in found.shrunk
    assert "method.encoder.drop_path 0.1 -> 0.0" in found.shrunk
    assert "resume" not in found.shrunk
    for words in ("method simmim", "50% thrown (furthest)", "ZeRO-2", "schedule step", "bf16"):
        assert words in found.kept


def of_the_day(day: datetime.date) -> str:
    """One recipe of each method, kind of encoder and way to throw, in turn."""
    kinds: dict[Any, str] = {}
    for recipe in pre_trainings():
        method: Any = recipe.method
        kind = (type(method), method.encoder.kind, recipe.throw_ratio > 0 and (recipe.mask, recipe.partial))
        kinds.setdefault(kind, recipe.name)
    names = [*kinds.values(), "finetune_mae_vit_base_800e", "knn_probe"]
    return names[day.toordinal() % len(names)]


def test_the_recipe_of_the_day_goes_through_all_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = of_the_day(datetime.datetime.now(datetime.UTC).date())
    code = rehearse(prepare(name, begin=Forked), tmp_path / "kept")
    printed = capsys.readouterr().out
    with capsys.disabled():
        print(f"\nrehearsed today: {name}")
    assert code == 0, printed
    assert "all stages passed" in printed
    assert (tmp_path / "kept/undisturbed/metrics.jsonl").exists() or name == "knn_probe"


def test_a_recipe_at_fault_ends_with_the_stage_its_command_and_exit_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rehearsal = prepare("quickstart", ["ds_config=/nowhere.json"], begin=Forked)
    assert rehearse(rehearsal, tmp_path) == 2
    *_, failed = capsys.readouterr().out.partition("undisturbed  FAILED")
    for part in (
        "exit code 2 (rank 0 of 2)",
        "command: python ",
        "train.py quickstart",
        "/nowhere.json",
        str(tmp_path),
    ):
        assert part in failed


def plain(words: list[str], more: Mapping[str, str], log: Path) -> processes.Process:
    """A process of its own without any of our code."""
    return processes.start(["-S", "-c", words[0]], more, log)


def test_a_job_tells_which_rank_failed_and_how_its_log_ends(tmp_path: Path) -> None:
    script = "import os, sys; print('oh dear'); sys.exit(7 * int(os.environ['RANK']))"
    job = Job(plain, "name", [script], tmp_path, ranks=2)
    with pytest.raises(StageFailed, match=r"exit code 7 \(rank 1 of 2\)[\s\S]*name-1.log[\s\S]*oh dear") as failure:
        job.finish()
    assert failure.value.code == 1


def test_a_job_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "TIMEOUT", 0.3)
    job = Job(plain, "name", ["import time; time.sleep(100)"], tmp_path, ranks=2)
    with pytest.raises(StageFailed, match="did not end within 0.3 s"):
        job.finish()
    assert not job.running()


def rehearsal_of(folder: Path, script: str) -> Rehearsal:
    """With ranks that run a script instead of train.py."""
    (folder / "logs").mkdir()

    def begin(words: list[str], more: Mapping[str, str], log: Path) -> processes.Process:
        return plain([f"FOLDER = {str(folder)!r}\n{script}"], more, log)

    return Rehearsal("quickstart", RECIPES["quickstart"], folder, Path("train.py"), begin)


CHECKPOINT = "import os, time; os.makedirs(f'{FOLDER}/killed/checkpoints/step-4', exist_ok=True)\n"


def test_a_rank_that_goes_on_after_the_other_was_killed_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "LEAVE_SECONDS", 0.3)
    with pytest.raises(StageFailed, match="rank 0 went on for 0.3 s"):
        rehearsal_of(tmp_path, CHECKPOINT + "time.sleep(100)").killed()


def test_a_run_that_ends_before_it_could_be_killed_fails(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="ended before a rank could be killed"):
        rehearsal_of(tmp_path, "pass").killed()


@pytest.mark.parametrize(
    ("step", "value", "told"),
    [
        (None, 0.0, None),
        (7, 1.0000001, None),
        (7, 1.1, "differ by at most 1.0e-01"),
        (7, float("nan"), "differ by at most"),
        (3, 1.0000001, "steps [3], before the kill"),
    ],
)
def test_losses_after_the_resumption_are_compared(
    tmp_path: Path, step: int | None, value: float, told: str | None
) -> None:
    for run in ("undisturbed", "killed"):
        (tmp_path / run / "checkpoints/step-4").mkdir(parents=True)
        values = {number: value if number == step and run == "killed" else 1.0 for number in range(1, 13)}
        lines = [json.dumps({"step": number, "loss": loss}) for number, loss in values.items()]
        (tmp_path / run / "metrics.jsonl").write_text("\n".join(lines))
    rehearsal = rehearsal_of(tmp_path, "print('resuming after step 4 of 12')")
    if told is None:
        assert "from step 4 to 12 on 1 rank" in rehearsal.resumed()
    else:
        with pytest.raises(StageFailed) as failure:
            rehearsal.resumed()
        assert told in str(failure.value)


def test_a_run_that_starts_afresh_instead_fails(tmp_path: Path) -> None:
    (tmp_path / "killed/checkpoints/step-4").mkdir(parents=True)
    with pytest.raises(StageFailed, match="did not say that it went on from step 4"):
        rehearsal_of(tmp_path, "pass").resumed()


def test_an_installation_without_the_repository_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    with pytest.raises(UserError, match="comes with the repository"):
        prepare("quickstart")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["quikstart"], "did you mean quickstart"),
        (["quickstart", "zero_stag=1"], "did you mean zero_stage"),
        (["quickstart", "--keep", "FULL"], "holds files"),
        (["knn_probe", "--finetune", "knn_probe"], "is an evaluation itself"),
        (["quickstart", "--finetune", "mae_vit_base_800e"], "this needs an evaluation"),
    ],
)
def test_a_users_mistake_is_one_message(
    arguments: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").touch()
    assert main(["rehearse", *(word.replace("FULL", str(tmp_path)) for word in arguments)]) == 2
    assert part in capsys.readouterr().err
