"""Counting right answers, and the votes of neighbours."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
import torch

from ummim.downstream import knn
from ummim.downstream.evaluate import Accuracy, lacks_evaluation, rank_of_label, summed, write_evaluation
from ummim.downstream.evaluated import _print
from ummim.downstream.knn import Features, by_row, greatest, nearest, vote
from ummim.downstream.recipe import ClassifyConfig
from ummim.downstream.robustness import Counts, _rates
from ummim.engine import zero


def test_the_rank_of_a_label_counts_what_stands_before_it() -> None:
    nan, inf = float("nan"), float("inf")
    outputs = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [nan, 1.0, 0.0], [inf, 1.0, 0.0]])
    labels = torch.tensor([2, 0, 2, 1, 0])
    assert rank_of_label(outputs, labels).tolist() == [1, 0, 2, 3, 3]  # what is no number is never right


def test_sums_are_of_the_batches_in_their_order() -> None:
    table = torch.tensor([[4.0, 2, 3, 1e16], [1, 1, 1, 1], [0, 0, 0, 0], [3, 0, 2, -1e16]], dtype=torch.float64)
    found = summed(table, 2)
    assert (found.images, found.top1, found.top5, found.unreadable) == (8, 37.5, 75.0, 2)
    assert found.loss == ((1e16 + 1) - 1e16) / 8  # in this order alone
    assert str(found) == "top-1 37.50, top-5 75.00, loss 0.0000 (8 images, 2 unreadable)"
    assert summed(torch.zeros(1, 4, dtype=torch.float64), 3).images == 0


def test_a_line_without_accuracy_asks_for_it(tmp_path: Path) -> None:
    assert not lacks_evaluation(tmp_path, 3)
    lines = [{"step": 3, "loss": 1.0}, {"step": 6, "loss": 1.0, "val_top1": 50.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [lacks_evaluation(tmp_path, step) for step in (2, 3, 6)] == [False, True, False]


def test_evaluation_json_holds_the_weights_numbers_and_the_averages(tmp_path: Path) -> None:
    found = {"weights": Accuracy(8, 50.0, 75.0, 1.5, 0), "average": Accuracy(8, 62.5, 75.0, 1.25, 0)}
    write_evaluation(tmp_path / "new", {"step": 3}, found)
    values = json.loads((tmp_path / "new" / "evaluation.json").read_text())
    assert (values["step"], values["top1"], values["ema"]["top1"]) == (3, 50.0, 62.5)


def test_what_is_no_number_is_null_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for loss in (float("nan"), float("inf")):
        diverged = Accuracy(8, 0.0, 0.0, loss, 0)
        write_evaluation(tmp_path, {"step": 3}, {"weights": diverged, "average": diverged})
        values = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=refuse)
        assert values["loss"] is values["ema"]["loss"] is None
        assert _rates(Counts(8, 0, 0, loss))["loss"] is None
        _print({"step": 3}, diverged, True)
        assert json.loads(capsys.readouterr().out, parse_constant=refuse)["loss"] is None


def features(count: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    values = torch.nn.functional.normalize(torch.randn(count, 5, generator=generator), dim=1)
    return Features(torch.arange(count), torch.randint(0, 6, (count,), generator=generator), values, 0)


@pytest.mark.parametrize("temperature", [0.3, 0.07, 0.001])
def test_votes_are_those_of_a_plain_loop(world: zero.World, temperature: float) -> None:
    train, val = features(40, 0), features(30, 1)
    config = ClassifyConfig(classes=6, neighbours=7, temperature=temperature)
    right = within = 0
    for query, label in zip(val.values, val.labels.tolist(), strict=True):
        by_similarity = sorted(((float(query @ other), -row) for row, other in enumerate(train.values)), reverse=True)
        votes = [Decimal(0)] * 6
        for similarity, row in by_similarity[:7]:
            votes[int(train.labels[-row])] += Decimal(similarity / temperature).exp()  # never overflows
        order = sorted(range(6), key=lambda c: (-votes[c], c))
        right, within = right + (order[0] == label), within + (label in order[:5])
    found = vote(train, val, config, world)
    assert found == Accuracy(30, 100 * right / 30, 100 * within / 30, None, 0)
    assert 0 < right < within


def test_of_equally_near_images_the_first_rows_count(world: zero.World) -> None:
    same = torch.ones(6, 2) / 2**0.5
    train = Features(torch.tensor([5, 3, 4, 0, 2, 1]), torch.tensor([50, 30, 40, 0, 20, 10]), same, 0)
    near, labels = nearest(same[:1], by_row(train), 3, world)
    assert labels.tolist() == [[0, 10, 20]]
    near, labels = nearest(same[:1], train, 8, world)  # more than there are
    assert labels.shape == (1, 8)
    assert near[0, 6:].tolist() == [-torch.inf] * 2


def test_an_interruption_ends_the_votes(world: zero.World) -> None:
    assert vote(features(9, 0), features(9, 1), ClassifyConfig(classes=6), world, lambda: 143) is None


@pytest.mark.parametrize("part", [1, 7, 40, 1000])
def test_the_greatest_are_those_of_a_stable_sort_however_the_bank_is_parted(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of small whole numbers: exact, and full of ties."""
    monkeypatch.setattr(knn, "BANK", part)
    generator = torch.Generator().manual_seed(0)
    queries, bank = (torch.randint(-1, 2, (count, 3), generator=generator).float() for count in (50, 100))
    for k in (1, 5, 60, 200):
        values, places = greatest(queries, bank, k)
        expected, order = (queries @ bank.T).sort(dim=1, descending=True, stable=True)
        assert torch.equal(places, order[:, :k])
        assert torch.equal(values, expected[:, :k])
    assert [tuple(found.shape) for found in greatest(queries, bank[:0], 5)] == [(50, 0), (50, 0)]
