"""A run's folder is read as far as it can be."""

import json
from pathlib import Path

import pytest

from tests.report.conftest import MakeRun, record, write_metrics
from ummim.errors import UserError
from ummim.report.read import flatten, number, read_run, read_runs


def test_a_whole_run_has_nothing_to_note(make_run: MakeRun) -> None:
    run = read_run(make_run())
    assert run.notes == {}
    assert [sample.step for sample in run.series("loss")] == list(range(1, 25))
    assert [each.step for each in run.checkpoints] == [8, 16]
    assert all(each.wrong is None and each.stays and each.whole_weights for each in run.checkpoints)
    assert [epoch for epoch, _ in run.figures] == [1, 2, 3]
    assert len(run.starts()) == 2
    assert run.stop_step() == 32


def test_a_half_written_last_line_is_left_out_and_named(make_run: MakeRun) -> None:
    folder = make_run()
    write_metrics(folder, [record(1), record(2)], '{"step": 3, "lo')
    run = read_run(folder)
    assert run.last("step") == 2
    assert "last line" in run.notes["metrics.jsonl"]


@pytest.mark.parametrize(
    "line",
    ["[1, 2]", "7", "null", "\x00\xff", '{"step": "x"}', '{"step": 1e999}', '{"step": true}', "[" * 100_000, "{}"],
    ids=lambda line: line[:12],
)
def test_a_damaged_line_costs_only_itself(make_run: MakeRun, line: str) -> None:
    folder = make_run()
    text = "\n".join([json.dumps(record(1)), line, json.dumps(record(2))]) + "\n"
    (folder / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    run = read_run(folder)
    assert [sample.step for sample in run.series("loss")] == [1, 2]
    assert "1 of 3 lines" in run.notes["metrics.jsonl"]


def test_what_is_not_finite_is_none_and_what_is_no_number_is_left_out(make_run: MakeRun) -> None:
    folder = make_run()
    text = '{"step": 1, "loss": NaN, "lr": Infinity, "grad_norm": null, "huge": 1%s, "note": "x"}' % ("0" * 400)
    (folder / "metrics.jsonl").write_text(text)
    run = read_run(folder)
    assert run.metrics == [{"step": 1.0, "loss": None, "lr": None, "grad_norm": None, "huge": None}]
    assert run.last("loss") is None
    assert number(True) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [("a: [", "cannot be read"), ("[1, 2]", "holds no keys"), ("", "holds no keys"), ("a: &x {b: *x}", "cannot be"),
     ("a: 2020-13-45", "cannot be read"), ("\xff\xfe\x00", "cannot be read")],
)  # fmt: skip
def test_a_damaged_recipe_is_noted(make_run: MakeRun, text: str, told: str) -> None:
    folder = make_run()
    (folder / "recipe.yaml").write_bytes(text.encode("latin-1"))
    run = read_run(folder)
    assert run.recipe == {}
    assert told in run.notes["recipe.yaml"]
    assert run.label == "run"
    assert run.stop_step() is None


def test_a_recipe_alone_is_a_run_and_what_is_missing_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (make_run() / "recipe.yaml").rename(folder / "recipe.yaml")
    run = read_run(folder)
    expected = {"environment.json": "missing", "metrics.jsonl": "missing", "checkpoints": "no checkpoint yet"}
    assert run.notes == expected
    assert not (run.starts() or run.checkpoints or run.figures or run.faults)


def test_a_folder_that_is_no_run_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"is no run's folder.*recipe\.yaml"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "gone")
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "notes.txt")


def test_a_checkpoint_says_what_is_wrong_with_it(make_run: MakeRun) -> None:
    folder = make_run(steps=(8, 16, 24, 32)) / "checkpoints"
    (folder / "step-8" / "manifest.json").unlink()
    weights = folder / "step-16" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (folder / "step-24" / "manifest.json").write_text('{"files": [1]}')
    (folder / "step-32" / "model.safetensors").unlink()
    wrong = [each.wrong or "" for each in read_run(folder.parent).checkpoints]
    told = ["manifest.json is missing", "model.safetensors cut short", "cannot be used", "model.safetensors is missing"]
    assert all(part in text for part, text in zip(told, wrong, strict=True)), wrong


def test_runs_of_one_name_are_told_apart_by_their_folders(make_run: MakeRun, tmp_path: Path) -> None:
    folders = [make_run(name) for name in ("a", "b")]
    for folder in folders:
        recipe = folder / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(f"name: {folder.name}", "name: same"))
    assert [run.label for run in read_runs(folders)] == ["a", "b"]
    assert [run.label for run in read_runs([folders[0], folders[0] / ".." / "a"])] == ["same"]
    (tmp_path / "deep").mkdir()
    moved = folders[1].rename(tmp_path / "deep" / "a")
    assert [run.label for run in read_runs([folders[0], moved])] == [str(folders[0]), str(moved)]


def test_a_run_that_stops_early_ends_at_max_steps(make_run: MakeRun) -> None:
    folder = make_run()
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("max_steps: null", "max_steps: 20"))
    assert read_run(folder).stop_step() == 20


def test_flatten_joins_sections_and_keeps_empty_ones() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}
