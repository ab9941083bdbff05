"""Optimizer state on a disk: what is refused, what it takes there, and that it changes no bit of a run.

Training itself needs DeepSpeed's operator, which takes minutes to compile: those tests are skipped until it is built
(``BUILD``).
"""

import errno
import json
import math
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import losses, run_ranks
from tests.engine.elastic import train
from tests.engine.toy import ToyPlan, ToyRecipe, build_toy
from ummim.capacity.strategy import Shapes
from ummim.engine import nvme, resume, zero
from ummim.engine.checkpoint_shards import MASTER, Contents
from ummim.errors import RecipeError, UserError

WIDTH = 256  # wide enough for sub-groups of more than a MiB
BUILT = any(nvme.operator_folder().glob("async_io/async_io.so"))
BUILD = "python -c 'from ummim.engine.zero import build_async_io; build_async_io()'"
SAID = f"no async_io in {nvme.operator_folder()}: {BUILD}"
needs_operator = pytest.mark.skipif(not BUILT, reason=SAID)


def write(tmp_path, stage=3, sub_group=600_000, **offload):
    """A configuration on disk, like the packaged one."""
    config = json.loads((zero.config_folder() / "zero3_nvme.json").read_text())
    section = config["zero_optimization"]
    section["offload_optimizer"] |= {"nvme_path": str(tmp_path / "local"), **offload}
    section |= {"stage": stage, "sub_group_size": sub_group}
    path = tmp_path / "nvme.json"
    path.write_text(json.dumps(config))
    return str(path)


def loaded(tmp_path, **keys):
    recipe = ToyRecipe(zero_stage=3, output=str(tmp_path / "run"), ds_config=write(tmp_path, **keys))
    return zero.deepspeed_config(recipe, ToyPlan(world_size=1))


def test_each_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("NVME_PATH", str(tmp_path / "scratch"))
    recipe = ToyRecipe(zero_stage=3, ds_config=str(zero.config_folder() / "zero3_nvme.json"), output=str(tmp_path))
    paths = [
        zero.deepspeed_config(replace(recipe, output=output), ToyPlan())["zero_optimization"]["offload_optimizer"][
            "nvme_path"
        ]
        for output in (str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path / "x" / ".." / "one"))
    ]
    assert paths[0] == paths[2] != paths[1]
    assert all(path.startswith(str(tmp_path / "scratch" / "ummim-")) for path in paths)
    assert not (tmp_path / "scratch").exists()  # asking makes nothing


@pytest.mark.parametrize(
    ("given", "stage", "said"),
    [
        ("$NO_SUCH_VARIABLE", 3, "nvme_path=.NO_SUCH_VARIABLE: give the absolute path .* or set the variable"),
        ("", 3, "nvme_path=: give the absolute path"),
        ("disk", 3, "nvme_path=disk: give the absolute path"),
        ("CHECKPOINTS", 3, "checkpoints are there; name another folder"),
        ("/disk", 2, "offload_optimizer: that takes zero_stage=3"),
        ("/disk", 3, "sets buffer_count=7: 12 are needed"),
    ],
)
def test_a_place_that_cannot_be_is_refused(tmp_path, given, stage, said):
    given = given.replace("CHECKPOINTS", str(tmp_path / "run" / "checkpoints" / "step-5"))
    few = {"buffer_count": 7, "pipeline_read": True, "pipeline_write": True} if "buffer" in said else {}
    path = write(tmp_path, stage=stage, nvme_path=given, **few)
    with pytest.raises(RecipeError, match=said):
        zero.deepspeed_config(ToyRecipe(zero_stage=stage, ds_config=path, output=str(tmp_path / "run")), ToyPlan())


def prepare(tmp_path, world, build=lambda: None, **keys):
    config = loaded(tmp_path, **keys)
    nvme.prepare(config, [[torch.empty(1_000_000)]], replace(world, device=torch.device("cpu")), build)


def test_a_folder_without_direct_io_is_refused(tmp_path, world, monkeypatch):
    opened = os.open

    def refuse(path, flags, mode=0o777, **rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, mode, **rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match="nvme_path: .* cannot be used: no direct I/O .* local disk"):
        prepare(tmp_path, world)


def test_a_file_in_the_folders_place_is_refused(tmp_path, world):
    (tmp_path / "local").write_text("")
    with pytest.raises(UserError, match="nvme_path: .*local.* cannot be used: Not a directory"):
        prepare(tmp_path, world)


def test_a_disk_that_is_too_small_is_refused(tmp_path, world, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30, 15_999_999))
    with pytest.raises(UserError, match=r"has 0\.01 GiB free, the optimizer states of 1 ranks take 0\.01"):
        prepare(tmp_path, world)
    nvme.remove_folders()
    assert not list((tmp_path / "local").iterdir())


def test_a_host_that_locks_no_memory_is_refused(tmp_path, world):
    with pytest.raises(UserError, match="does not let this process lock .* raise `ulimit -l`"):
        prepare(tmp_path, world, buffer_count=10**6)


def test_an_operator_that_cannot_be_built_is_refused_and_a_stale_lock_removed(tmp_path, world, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    lock = nvme.operator_folder() / "async_io" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()

    def build():
        assert os.environ["TORCH_EXTENSIONS_DIR"] == str(nvme_folder) and not lock.exists()
        raise RuntimeError("Unable to JIT load the async_io op\nand more")

    nvme_folder = nvme.operator_folder()
    with pytest.raises(UserError, match=r"async_io cannot be built on .* \(Unable .* op\): .*libaio-dev"):
        prepare(tmp_path, world, lambda: nvme.build(build))
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "extensions")


def test_leftovers_of_a_killed_start_are_removed(tmp_path, world):
    folder = Path(loaded(tmp_path)["zero_optimization"]["offload_optimizer"]["nvme_path"])
    (folder / "zero_stage_3/optimizer/rank7").mkdir(parents=True)
    prepare(tmp_path, world)
    assert not list(folder.iterdir())
    nvme.remove_folders()
    assert not folder.exists()


def test_sub_groups_and_bytes():
    swapping = nvme.Swapping(sub_group=300_000, least=2**20, aligned=256, buffers=4)
    assert swapping.sub_groups([200_000, 200_001, 5, 300_000]) == [[200_000, 200_001], [5, 300_000]]
    assert swapping.sub_groups([1, 2]) == [[1, 2]]
    found = swapping.bytes([[200_000, 200_001, 5, 300_000], [10, 20]])
    # 400,001 and 300,005 elements, each padded to 256; of the gradients only 300,000, in whole 256s, are a MiB
    assert found == nvme.SwapBytes(
        files=12 * (1563 * 256 + 1172 * 256) + 4 * 1171 * 256,
        kept=4 * (400_001 + 300_005 - 1171 * 256) + 16 * 30,
        locked=4 * 4 * 1563 * 256,
    )


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Name -> folder, losses and what ``train`` gave, of runs of ten steps; with ``from``, of the last five."""
    folder = tmp_path_factory.mktemp("runs")
    disk = {"zero_stage": 3, "ds_config": write(folder)}
    cases: dict[str, dict[str, Any]] = {
        "memory": {"zero_stage": 3, "ema": 0.9},
        "disk": {**disk, "ema": 0.9},
        "disk, resumed": {**disk, "ema": 0.9, "from": "disk"},
        "disk to memory": {"zero_stage": 1, "from": "disk"},
        "memory to disk, bf16": {**disk, "precision": "bf16", "from": "memory"},
    }
    swapping = nvme.Swapping.of(json.loads(Path(disk["ds_config"]).read_text()))
    assert swapping is not None
    expected = swapping.bytes(Shapes.of(build_toy(width=WIDTH)).groups)
    found = {}
    for name, case in cases.items():
        origin = {"from": str(folder / case["from"] / "checkpoints" / "step-5")} if "from" in case else {}
        given = train({**case, **origin, "width": WIDTH, "output": str(folder / name)}, world)
        found[name] = (folder / name, losses(folder / name), given)
        taken = sum(path.stat().st_size for path in (folder / "local").rglob("*.swp"))
        assert taken == (expected.files if case["zero_stage"] == 3 and "ds_config" in case else 0)
        nvme.remove_folders()
    return found


def contents(folder, step=5):
    state = resume.read_state(folder / "checkpoints" / f"step-{step}")
    return state, Contents(folder / "checkpoints" / f"step-{step}", state.step, state.layout)


def same(one, other, step=5):
    (before, old), (after, new) = contents(one, step), contents(other, step)
    assert before.optimizer == after.optimizer and before.optimizer["adam_steps"] == step
    for kind in {MASTER, "exp_avg", "exp_avg_sq"} | (old.kinds & new.kinds):
        for name, shape in old.shapes.items():
            ours, theirs = (each.read(kind, name, 0, math.prod(shape)) for each in (new, old))
            assert torch.equal(ours, theirs), (kind, name)
            assert kind != "exp_avg_sq" or ours.max() > 0, name


@needs_operator
def test_it_changes_no_bit_of_losses_weights_moments_and_average(runs):
    (memory, plain, weights), (disk, found, ours) = runs["memory"], runs["disk"]
    assert len(found) == 10 and found == plain
    same(memory, disk)
    same(memory, disk, step=10)
    for one, other in zip(weights, ours, strict=True):  # weights, average in their place, weights
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert not torch.equal(ours[0]["head.weight"], ours[1]["head.weight"])


@needs_operator
@pytest.mark.parametrize("name", ["disk, resumed", "disk to memory", "memory to disk, bf16"])
def test_a_checkpoint_goes_to_a_disk_and_from_it_to_the_bit(runs, name):
    folder, found, _ = runs[name]
    before = runs["memory"][1]
    same(runs["memory"][0], folder.with_name(name + "-again"))
    assert list(found) == [6, 7, 8, 9, 10]
    if name == "disk, resumed":
        assert found == {step: before[step] for step in found}
        same(runs["memory"][0], folder, step=10)
    near = 5e-3 if "bf16" in name else 1e-6
    assert list(found.values()) == pytest.approx([before[step] for step in found], rel=near)


@needs_operator
def test_two_ranks_share_a_disk(tmp_path):
    """Their parts are of one MiB and more, and of less; the second run goes on in other ranks' files."""
    disk = {"zero_stage": 3, "ds_config": write(tmp_path), "width": WIDTH}
    cases = {
        "memory": {"zero_stage": 3, "width": WIDTH},
        "disk": disk,
        "resumed": {**disk, "from": str(tmp_path / "memory" / "checkpoints" / "step-5")},
    }
    listed = [{**case, "output": str(tmp_path / name)} for name, case in cases.items()]
    jobs = run_ranks(2, "elastic", listed)
    assert not any(job.returncode for job in jobs), [job.stderr[-3000:] for job in jobs]
    for name in ("disk", "resumed"):
        found = losses(tmp_path / name)
        assert found == {step: loss for step, loss in losses(tmp_path / "memory").items() if step in found}
        same(tmp_path / "memory", tmp_path / name, step=10)
    assert not list(tmp_path.rglob("*.swp")) and not list((tmp_path / "local").iterdir())


@needs_operator
def test_no_swap_file_is_in_a_checkpoint_or_left(runs):
    root = runs["disk"][0].parent
    assert not list(root.rglob("*.swp")) and not list((root / "local").iterdir())
