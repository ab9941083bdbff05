"""metrics.jsonl, TensorBoard, W&B and the lines on the terminal."""

import json
import math
import os
import sys
import types
from itertools import product
from typing import Any

import pytest
import torch

from tests.engine.conftest import records
from tests.engine.toy import ToyPlan, ToyRecipe, build_toy, toy_batches
from ummim.engine import metrics
from ummim.engine.metrics import MetricsLog, Progress, drop_after
from ummim.engine.trainer import step_seed, train
from ummim.engine.zero import World
from ummim.errors import UserError

MAIN = World(0, 0, 1, torch.device("cpu"))
PLAN = ToyPlan(world_size=1)


def record(step, **more):
    return {"step": step, "epoch": step / 4, "loss": 0.5, "images_per_second": 3.0, **more}


def test_resuming_drops_later_lines_and_torn_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step}) for step in (2, 4, 6)]
    path.write_text("\n".join([*good, "[1]", '{"no": "step"}', "\x00\x00", '{"step": 3, "loss": 0.']))
    drop_after(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'
    drop_after(path, 0)
    assert path.read_text() == ""
    drop_after(tmp_path / "absent.jsonl", 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_training_outlives_whoever_read_its_output(monkeypatch: pytest.MonkeyPatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        for step in (1, PLAN.stop_step):
            Progress(PLAN, 0).show(record(step))
    monkeypatch.setattr(sys, "stdout", None)  # closed before
    Progress(PLAN, 0).show(record(PLAN.stop_step))


def test_a_line_is_on_disk_as_soon_as_it_is_logged_and_stays_json(tmp_path):
    with MetricsLog(ToyRecipe(output=str(tmp_path)), PLAN, 0, MAIN) as log:
        log.log(record(1, grad_norm=math.inf, loss_scale=math.nan))
        [line] = records(tmp_path)
    assert line == record(1, grad_norm=None, loss_scale=None)


def test_other_ranks_write_nothing(tmp_path):
    other = World(1, 1, 2, torch.device("cpu"))
    with MetricsLog(ToyRecipe(output=str(tmp_path / "run"), tensorboard=True), PLAN, 0, other) as log:
        log.log(record(1))
        log.advance(1)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = ToyRecipe(output=str(tmp_path), tensorboard=True)
    for start, stop in ((0, 4), (2, 4)):  # the second run starts again from step 2
        with MetricsLog(recipe, PLAN, start, MAIN) as log:
            for step in range(start + 1, stop + 1):
                log.log(record(step, grad_norm=None))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4]
    assert "grad_norm" not in events.Tags()["scalars"]


def test_wandb_is_a_clear_message_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb=mim: wandb is not installed: pip install wandb"):
        MetricsLog(ToyRecipe(output=str(tmp_path), wandb="mim"), PLAN, 0, MAIN)


def test_wandb_goes_on_in_the_same_run_of_the_same_folder(tmp_path, monkeypatch):
    started: list[Any] = []
    logged: list[int] = []
    ended: list[int] = []
    run = types.SimpleNamespace(
        log=lambda numbers, step: logged.append(step), finish=lambda exit_code: ended.append(exit_code)
    )

    def init(**options: Any) -> types.SimpleNamespace:
        started.append(options)
        return run

    fake = types.SimpleNamespace(init=init)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        with MetricsLog(ToyRecipe(output=str(tmp_path), wandb="mim"), PLAN, step - 1, MAIN) as log:
            log.log(record(step))
    assert started[0] == started[1] and started[0]["project"] == "mim" and started[0]["resume"] == "allow"
    assert (logged, ended) == ([1, 2], [0, 0])


def test_away_from_a_terminal_a_line_comes_now_and_then(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 1000, 4))  # four seconds between two looks at the clock
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    with MetricsLog(ToyRecipe(output=str(tmp_path)), ToyPlan(stop_step=8), 0, MAIN) as log:
        for step in range(1, 9):
            log.log(record(step))
    shown = [line.split()[3] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["1/8", "4/8", "7/8", "8/8"]


def test_on_a_terminal_there_is_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with MetricsLog(ToyRecipe(output=str(tmp_path)), PLAN, 0, MAIN) as log:
        log.log(record(1))
        log.advance(10)
    shown = capsys.readouterr()
    assert "epoch 0.25" in shown.err and "10/10" in shown.err and "loss 0.5000, 3.0 images/s" in shown.err
    assert shown.out == ""


def test_a_run_logs_the_contracts_numbers(world, tmp_path):
    recipe = ToyRecipe(output=str(tmp_path), log_every=4, zero_stage=1)
    ends: list[int] = []

    def on_epoch_end(pause):
        ends.append(pause.step)
        return {}

    code = train(build_toy(), recipe, PLAN, world, "d", lambda done: toy_batches(PLAN, 0, done), on_epoch_end)
    assert (code, ends) == (0, [4, 8, 10])
    lines = records(tmp_path)
    assert [(r["step"], r["epoch"], r["samples"]) for r in lines] == [(4, 1.0, 16), (8, 2.0, 32), (10, 2.5, 40)]
    for line in lines:
        assert line["grad_norm"] > 0 and line["images_per_second"] > 0 and 0 <= line["data_wait"] <= 1
        assert {"loss", "lr", "peak_memory_mib", "spread"} <= line.keys()


def test_every_micro_batch_draws_its_own_noise():
    numbers = product(range(5), range(100), range(8), range(3))  # seed, step, rank, micro-batch
    seeds = {step_seed(*number) for number in numbers}
    assert len(seeds) == 12000 and max(seeds) < 2**56
    assert step_seed(0, 7, 1) == step_seed(0, 7, 1)
