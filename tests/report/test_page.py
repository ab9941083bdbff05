"""The page: whole in itself, of any run, and safe whatever the run's files say."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.conftest import TINY_UM_MAE
from tests.report.conftest import MakeRun, record, write_metrics
from ummim.__main__ import main
from ummim.report.page import write_report

EVIL = "<script>alert(1)</script>"


class Reader(HTMLParser):
    """Collects a page's elements and what is between them, and checks that they close."""

    VOID = ("meta", "input", "img", "line", "circle", "path")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(each == tag for each, _ in self.elements)


def read(path: Path) -> Reader:
    return Reader(path.read_text())


def test_a_run_in_progress_has_every_section(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run()
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.startswith(f"{folder / 'report.html'}: 0.")
    page = read(folder / "report.html")
    sections = [attrs["id"] for tag, attrs in page.elements if tag == "section"]
    expected = [
        "overview",
        "curves",
        "reconstructions",
        "masks",
        "health",
        "events",
        "recipes",
        "environment",
        "commands",
    ]
    assert sections == expected
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    assert links == [f"#{name}" for name in sections]
    for part in (
        "step 24 of 32, epoch 3.00; last line",
        "of training left at the recent rate",
        "3 of 3 figures",
        "step 16, 16 images of the packaged photographs",
        "Started 2 times",
        "0123456789ab+",
        "step-16 2.00",
        "python train.py tiny.yaml 'name=two words' ummim export",
    ):
        assert part in page.text, part
    assert "--local_rank" not in page.text
    assert not list(folder.glob("*.tmp"))


def test_nothing_outside_the_page_is_named(make_run: MakeRun) -> None:
    page = read(write_report([make_run()]))
    for tag, attrs in page.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            assert re.match(r"#|data:image/(png|jpeg);base64,", attrs.get(name) or "#"), (tag, attrs)
        assert not any(name.startswith("on") for name in attrs)
    assert page.count("script") == 1
    (policy,) = [attrs["content"] for _, attrs in page.elements if "http-equiv" in attrs]
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")


def test_text_from_a_run_stays_text(make_run: MakeRun) -> None:
    folder = make_run()
    recipe = folder / "recipe.yaml"
    evil = recipe.read_text().replace("name: run", f"name: '{EVIL}'")
    recipe.write_text(evil.replace("source: ''", "source: '<i>x</i>'").replace("top1: null", "top1: 83.6"))
    write_metrics(folder, [record(step, **{f"{EVIL}\ud800": step}) for step in range(1, 5)])
    fault = {"step": 2, "shard": EVIL, "key": "<b>", "byte": 5, "reason": '"><img src=x>', "attempt": 0}
    (folder / "data_faults.jsonl").write_text(json.dumps({**fault, "replacement": None}) + "\n")
    (folder / "bad_steps.jsonl").write_text(json.dumps({"step": 3, "bad": True, "reason": EVIL, "keys": [EVIL]}) + "\n")
    (folder / "environment.json").write_text(json.dumps({EVIL: EVIL, "command": ["train.py", EVIL]}))
    (folder / "stacks-<u>.txt").touch()
    page = read(write_report([folder]))
    assert page.count("script") == 1
    assert page.count("img") == 3 + 2 + 2  # figures, maps and examples
    assert page.count("i") == page.count("u") == 0
    assert page.text.count(EVIL) > 8
    assert (
        "83.6% top-1 on ImageNet-1K after fine-tuning: published by <i>x</i> for this recipe, not a result" in page.text
    )
    assert "Samples that could not be read: 1" in page.text
    assert "Steps left out: 1" in page.text


def test_runs_stand_in_one_chart_and_their_recipes_side_by_side(make_run: MakeRun) -> None:
    folders = [make_run("mae"), make_run("um_mae", TINY_UM_MAE)]
    page = read(write_report(folders, folders[0].parent / "both.html"))
    charts = [json.loads(attrs["data-chart"] or "") for tag, attrs in page.elements if tag == "svg"]
    loss = charts[0]
    assert [line["label"] for line in loss["lines"]] == ["mae", "um_mae"]
    assert [len(line["points"]) for line in loss["lines"]] == [24, 24]
    assert loss["lines"][0]["points"][3] == [0.5, 0.5]  # epoch, loss
    assert "mask.kind random uniform" in page.text
    assert "method.encoder.depth 2 –" in page.text
    assert "optim.base_lr" not in page.text.partition("in full")[0]  # the same in both
    assert "windows or pooling bound it" in page.text
    assert [line["label"] for line in charts[-1]["lines"]] == ["mae", "um_mae"]  # ranks by checkpoint


def test_metrics_of_a_fine_tuning_are_drawn(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "recipe.yaml").write_text("classify: {protocol: linear, encoder: {kind: vit}}\nname: probe\nepochs: 4\n")
    tested = {
        step: {"val_top1": 60.0 + step, "val_loss": 9 / step, "ema_top1": 1.0, "train_top1": 99.0}
        for step in (8, 16, 24)
    }
    write_metrics(folder, [record(step, **tested.get(step, {})) for step in range(1, 25)])
    (folder / "evaluation.json").write_text('{"top1": 84.25, "images": 21}')
    page = read(write_report([folder]))
    for part in ("Validation top-1", "Validation loss", "ema_top1", "val_top1 84 (epoch 3)", "top1 84.25 images 21"):
        assert part in page.text, part
    assert "classification, linear on vit" in page.text
    assert "train_top1" not in page.text  # it is of a batch, and counts for nothing
    assert "No masks: this run" in page.text and "not looked into: this run" in page.text


def test_losses_that_are_not_finite_are_counted(make_run: MakeRun) -> None:
    folder = make_run()
    write_metrics(folder, [record(step, **({"loss": None} if step in (3, 4) else {})) for step in range(1, 9)])
    assert "No number at 2 logged steps" in read(write_report([folder], look=False)).text


@pytest.mark.parametrize("kept", ["recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints", "reconstructions"])
def test_any_one_thing_of_a_run_makes_a_page(make_run: MakeRun, kept: str) -> None:
    whole = make_run()
    folder = whole.parent / "part"
    folder.mkdir()
    (whole / kept).rename(folder / kept)
    text = read(write_report([folder])).text
    assert ("recipe.yaml: missing" in text) == (kept != "recipe.yaml")
    assert ("metrics.jsonl: missing" in text) == (kept != "metrics.jsonl")
    assert ("No metrics yet." in text) == (kept != "metrics.jsonl")
    assert ("No reconstructions." in text) == (kept != "reconstructions")
    assert ("checkpoints: no checkpoint yet" in text) == (kept != "checkpoints")


@pytest.mark.parametrize("rubbish", [b"\x00\xff\xfe{", b"[]", b'{"a": {"b": [1e999, {}]}, "step": 1}'])
def test_rubbish_in_every_file_leaves_a_page(make_run: MakeRun, rubbish: bytes) -> None:
    folder = make_run()
    for name in (
        "recipe.yaml",
        "environment.json",
        "evaluation.json",
        "metrics.jsonl",
        "data_faults.jsonl",
        "bad_steps.jsonl",
    ):
        (folder / name).write_bytes(rubbish)
    assert read(write_report([folder], look=False)).count("section") >= 8


def test_a_checkpoint_that_cannot_be_used_is_named(make_run: MakeRun) -> None:
    folder = make_run()
    weights = folder / "checkpoints" / "step-16" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # as long as before
    weights.write_bytes(data)
    text = read(write_report([folder])).text
    assert "step-16 cannot be looked into" in text and "has changed" in text
    assert "run: step 8, 16 images" in text


def test_what_is_no_run_and_a_place_that_cannot_be_are_the_users_mistakes(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run()
    (tmp_path / "empty").mkdir()
    for words, told in (
        ([str(tmp_path / "empty")], "is no run's folder"),
        ([str(folder), str(tmp_path / "gone")], "no such folder"),
        ([str(folder), "--out", str(tmp_path)], "is a folder: name a file"),
        ([str(folder), "--out", str(tmp_path / "gone" / "a.html")], "there is no folder"),
    ):
        assert main(["report", *words]) == 2
        assert told in capsys.readouterr().err
    assert not (folder / "report.html").exists()
