"""Steps whose loss or gradient cannot be used."""

import json
import math

import pytest
import torch

from tests.engine.conftest import losses, records
from tests.engine.toy import ToyPlan, ToyRecipe, build_toy, toy_batches
from ummim.engine import bad_steps, zero_state
from ummim.engine.bad_steps import BadStepConfig, BadStepError, BadSteps, LossMean
from ummim.engine.resume import read_state
from ummim.engine.trainer import Accumulated, train

BAD = 6  # the step (from 1) that is spoilt; checkpoints are written after 4 and 8
PLAN = ToyPlan(world_size=1)


class Spoilt:
    """The toy's batches; those of step BAD hold what is no number, or their loss or gradient is made so."""

    def __init__(self, spoil, plan=PLAN):
        self.spoil, self.plan, self.fed = spoil, plan, []

    def __call__(self, done):
        for i, batch in enumerate(toy_batches(self.plan, 0, done)):
            step = done + 1 + i // self.plan.accumulation
            self.fed.append(step)
            if step == BAD:
                self.spoil(batch)
            yield batch


def not_a_number(batch):
    batch.images.fill_(math.nan)


def bright(batch):
    batch.images.mul_(30)


def start(folder, world, config, spoil=not_a_number, plan=PLAN, **keys):
    recipe = ToyRecipe(output=str(folder), checkpoint_every=4, bad_steps=config, **keys)
    folder.mkdir(exist_ok=True)
    batches = Spoilt(spoil, plan)
    task = build_toy()
    assert train(task, recipe, plan, world, "digest", batches) == 0
    return batches.fed, {name: value.clone() for name, value in task.state_dict().items()}


@pytest.mark.parametrize("keys", [{}, {"precision": "bf16", "zero_stage": 2}, {"zero_stage": 1}], ids=str)
def test_a_skipped_step_changes_no_weight_and_no_moment_however_it_comes_to_be_left_out(tmp_path, world, keys):
    """Dropped where it is met, gone back from, and listed by hand: one and the same run."""
    fed, skipped = start(tmp_path / "skip", world, BadStepConfig("skip"), **keys)
    assert fed == [step for step in range(1, 11) for _ in range(2)]
    fed, back = start(tmp_path / "back", world, BadStepConfig("rollback"), **keys)
    assert fed == [step for step in (*range(1, BAD + 1), *range(5, 11)) for _ in range(2)]
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / bad_steps.FILE).write_text(f'{{"step": {BAD}}}\n{{"step": ')  # and half a line
    _, listed = start(tmp_path / "listed", world, BadStepConfig("stop"), **keys)
    for name, value in skipped.items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, back[name]) and torch.equal(value, listed[name]), name
    assert losses(tmp_path / "skip") == losses(tmp_path / "back") == losses(tmp_path / "listed")
    assert [step for step, loss in losses(tmp_path / "skip").items() if loss is None] == [BAD]
    assert [record["bad_steps"] for record in records(tmp_path / "back")] == [0] * 4 + [1] * 6


def test_a_gradient_that_is_not_finite_is_found_where_the_loss_is_finite(tmp_path, world):
    task = build_toy()
    task.vit.patch_embed.proj.weight.register_hook(lambda grad: grad * math.nan if len(steps) == BAD else grad)
    steps: list[int] = []
    recipe = ToyRecipe(output=str(tmp_path), bad_steps=BadStepConfig("skip"))

    def batches(done):
        for i, batch in enumerate(toy_batches(PLAN, 0, done)):
            if i % PLAN.accumulation == 0:
                steps.append(i)
            yield batch

    assert train(task, recipe, PLAN, world, "digest", batches) == 0
    line = json.loads((tmp_path / bad_steps.FILE).read_text())
    assert (line["step"], line["reason"]) == (BAD, "the gradient is not finite")
    assert all(torch.isfinite(p).all() for p in task.parameters())


def test_a_leap_of_the_loss_is_bad_by_the_recipes_measure_alone(tmp_path, world, monkeypatch):
    monkeypatch.setattr(bad_steps, "SETTLED", 3)
    start(tmp_path / "any", world, BadStepConfig("stop"), bright)
    assert not (tmp_path / "any" / bad_steps.FILE).exists()
    start(tmp_path / "spike", world, BadStepConfig("skip", spike=5.0), bright)
    line = json.loads((tmp_path / "spike" / bad_steps.FILE).read_text())
    assert line["step"] == BAD and "times its recent mean" in line["reason"]
    assert losses(tmp_path / "spike")[BAD] > 5 * losses(tmp_path / "spike")[BAD - 1]


def test_a_margin_leaves_out_the_steps_before_and_goes_back_far_enough(tmp_path, world):
    fed, _ = start(tmp_path, world, BadStepConfig("rollback", margin=2))  # leaves out 4 to 6: step-4 is too late
    lines = [json.loads(line) for line in (tmp_path / bad_steps.FILE).read_text().splitlines()]
    assert [(line["step"], line["bad"]) for line in lines] == [(4, False), (5, False), (6, True)]
    assert fed == [step for step in range(1, 11) for _ in range(2)]  # no checkpoint before step 4: dropped instead


def test_the_budget_ends_the_run_and_keeps_the_evidence(tmp_path, world):
    with pytest.raises(BadStepError, match=r"not finite at step 6 \(samples: sample-20, .*budget = 0 .*step-6` reruns"):
        start(tmp_path, world, BadStepConfig("skip", budget=0))
    assert {path.name for path in (tmp_path / "bad_steps" / "step-6").iterdir()} >= {
        "model.safetensors",
        "rank-0-0.safetensors",
        "rank-0-1.safetensors",
    }
    assert not (tmp_path / bad_steps.FILE).exists()  # the same command meets it again


def test_at_most_three_bundles_are_kept(tmp_path, world, monkeypatch):
    wanted = []

    def weights(engine):
        wanted.append(1)
        return {"w": torch.zeros(1)}

    monkeypatch.setattr(zero_state, "full_state_dict", weights)
    bad = BadSteps(ToyRecipe(output=str(tmp_path), bad_steps=BadStepConfig("skip")), LossMean(), lambda: None, world)
    batch = next(toy_batches(PLAN, 0))
    micro = Accumulated([torch.tensor(math.nan)], {}, [batch], [], 0.0)
    for step in range(1, 6):
        bad._record(None, step, "the loss is not finite", micro, [0])
    assert len(list((tmp_path / "bad_steps").iterdir())) == len(wanted) == bad_steps.BUNDLES
    assert sorted(bad.listed) == [1, 2, 3, 4, 5]


def test_the_mean_of_the_losses_is_part_of_the_runs_state(tmp_path, world):
    """Stopped and resumed, a run measures a loss against the same mean."""
    for folder, stops in (("whole", [10]), ("parted", [5, 10])):
        for stop in stops:
            start(tmp_path / folder, world, BadStepConfig(), bright, ToyPlan(world_size=1, stop_step=stop))
    whole, parted = (read_state(tmp_path / folder / "checkpoints" / "step-10") for folder in ("whole", "parted"))
    assert (whole.loss_mean, whole.loss_count) == (parted.loss_mean, parted.loss_count)
    assert whole.loss_count == 10


def test_the_mean_is_plain_at_first_and_forgets_later():
    mean = LossMean()
    for loss in (1.0, 2.0, 6.0):
        mean = mean.add(loss)
    assert mean == LossMean(3.0, 3)
    assert LossMean(1.0, 1000).add(2.0).value == pytest.approx(1.02)
