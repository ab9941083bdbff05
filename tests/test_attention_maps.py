"""AMT as a user runs it: maps refreshed on the way, on one rank and two, killed, resumed, mislaid."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.__main__ import main as data_prep
from tests import forked
from tests.conftest import ROOT, TINY_MAE
from ummim.attention_maps import RowBatches, check_maps, whole_images
from ummim.data import Augment, DataConfig, ShardIndex, decode
from ummim.data.cache import ShardCache
from ummim.data.normalise import normalise
from ummim.data.shards import ShardReader
from ummim.engine.zero import World
from ummim.errors import CheckpointError
from ummim.interop.run import load_run
from ummim.masking import MaskConfig, PlanSampler

TINY_AMT = TINY_MAE.replace("name: mae", "name: amt\n  attention: {refresh_epochs: 1}")
assert "amt" in TINY_AMT


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 small pictures of several shapes in four shards: 3 optimizer steps an epoch."""
    source, out = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("data") / "shards"
    rng = np.random.default_rng(0)
    for i in range(26):
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        small.resize((60 + i, 80 - i), Image.Resampling.BICUBIC).save(source / f"{i:02d}.jpg")
    assert data_prep(["build", str(source), str(out), "--shard-count", "7"]) == 0
    return out


def train(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return forked.run(["train.py", *arguments], ROOT)


def losses(output: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len({record["step"] for record in records}) == len(records), "a step appears twice"
    return {record["step"]: record["loss"] for record in records}


def maps_of(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "attention").iterdir())}


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of twelve steps, never stopped, with data workers and a checkpoint after every epoch."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY_AMT.replace("SHARDS", str(shards)) + f"output: {folder / 'run'}\n")
    result = train(recipe, "data.workers=1", "checkpoint_every=3", "keep_checkpoints=10")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("attention maps of 26 images") == 3
    return folder / "run"


def test_a_run_has_a_file_of_maps_for_each_refresh(undisturbed: Path) -> None:
    assert list(maps_of(undisturbed)) == ["epoch-0001.npy", "epoch-0002.npy", "epoch-0003.npy"]  # none after the end
    maps = [np.load(path) for path in sorted((undisturbed / "attention").iterdir())]
    for each in maps:
        assert each.shape == (26, 4, 4)
        assert each.dtype == np.float16
        assert (each >= 0).all()
        assert (each <= 1).all()
        assert np.ptp(each, axis=(1, 2)).min() > 0  # no image was left out
    assert not np.array_equal(maps[0], maps[1])


def test_maps_are_those_of_the_weights_at_the_refresh_on_whole_images(undisturbed: Path, shards: Path) -> None:
    method: Any
    recipe, method, _ = load_run(undisturbed / "checkpoints" / "step-6")
    index = ShardIndex.open(shards)
    reader, augment = ShardReader(index), Augment(recipe.data)
    images = [decode(reader.read(row)).resize((32, 32), Image.Resampling.BICUBIC) for row in range(len(index))]
    assert np.array_equal(np.asarray(images[5]).transpose(2, 0, 1), augment.whole(decode(reader.read(5))).numpy())
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    found = np.load(undisturbed / "attention" / "epoch-0002.npy").astype(np.float32)
    assert found == pytest.approx(method.attention_map(normalise(pixels)).numpy(), abs=1e-3)
    reader.close()


def test_the_first_epochs_are_those_of_the_plain_method(undisturbed: Path, shards: Path, write_recipe: Any) -> None:
    recipe = write_recipe(TINY_MAE, shards)
    result = train(recipe, "method.norm_pix_loss=false", "data.workers=0")
    assert result.returncode == 0, result.stderr
    plain, driven = losses(recipe.parent / "run"), losses(undisturbed)
    assert [plain[step] for step in (1, 2, 3)] == [driven[step] for step in (1, 2, 3)]
    assert all(plain[step] != driven[step] for step in range(4, 13))


@pytest.mark.parametrize("stop", [5, 6])
def test_a_stopped_run_goes_on_bit_for_bit(
    stop: int, undisturbed: Path, shards: Path, write_recipe: Any, tmp_path: Path
) -> None:
    """Stopped between two refreshes, and right before one."""
    recipe = write_recipe(TINY_AMT, shards)
    assert train(recipe, f"max_steps={stop}").returncode == 0
    before = maps_of(tmp_path / "run")
    assert list(before) == ["epoch-0001.npy"]
    result = train(recipe)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert maps_of(tmp_path / "run") == maps_of(undisturbed)


def test_a_run_killed_while_it_computes_maps_goes_on_bit_for_bit(
    undisturbed: Path, shards: Path, write_recipe: Any, tmp_path: Path
) -> None:
    recipe = write_recipe(TINY_AMT, shards)
    process = forked.Job(["train.py", recipe, "checkpoint_every=1"], ROOT)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("attention/*0002*")) and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = train(recipe)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert maps_of(tmp_path / "run") == maps_of(undisturbed)


def test_maps_that_are_gone_or_anothers_are_one_message(undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output, ignore=shutil.ignore_patterns("step-1*"))
    command = (output / "recipe.yaml", f"output={output}", "checkpoint_every=100")
    later = train(*command, "max_steps=11")
    assert later.returncode == 0, later.stderr  # from step 9, at a refresh; stopped after step 11
    file = output / "attention" / "epoch-0003.npy"
    kept = file.read_bytes()
    np.save(file, np.zeros((25, 4, 4), np.float16))
    for remedy in ("other data or another model", "Restore the file"):
        result = train(*command, "max_steps=12")
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        lines = [line for line in result.stderr.splitlines() if "error:" in line]
        assert len(lines) == 1
        assert str(file) in lines[0]
        assert remedy in lines[0]
        file.unlink(missing_ok=True)
    file.write_bytes(kept)
    assert train(*command, "max_steps=12").returncode == 0
    assert losses(output) == losses(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "checkpointing"), [(2, "none"), (3, "none"), (3, "fairscale")])
def test_two_ranks_agree_with_one(
    stage: int, checkpointing: str, undisturbed: Path, shards: Path, write_recipe: Any, tmp_path: Path
) -> None:
    """Under ZeRO-3 no weight stays where it is used, however small: the maps' forward pass has to fetch them all."""
    config = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "ds.json").write_text(json.dumps(config))
    output, expected = tmp_path / "run", losses(undisturbed)
    command = [
        "train.py", write_recipe(TINY_AMT, shards), f"zero_stage={stage}", f"ds_config={tmp_path / 'ds.json'}",
        f"activation_checkpointing={checkpointing}", "data.workers=1", "micro_batch=2", "max_steps=8",
    ]  # fmt: skip
    ranks = forked.run_ranks(2, command, ROOT)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    assert [rank.stderr.count("attention maps of 26 images") for rank in ranks] == [2, 0]
    assert list(maps_of(output)) == ["epoch-0001.npy", "epoch-0002.npy"]
    found = losses(output)
    for step in range(1, 6):  # later, a rounding may have moved a token of some mask
        assert found[step] == pytest.approx(expected[step], rel=1e-4)
    for name in maps_of(output):
        mine, theirs = (np.load(run / "attention" / name).astype(np.float32) for run in (output, undisturbed))
        assert mine == pytest.approx(theirs, abs=0.02)


@pytest.mark.parametrize(("rows", "batch", "ranks"), [(26, 4, 1), (26, 4, 3), (3, 8, 2), (16, 4, 4)])
def test_ranks_take_every_row_once_in_order_and_equally_often(rows: int, batch: int, ranks: int) -> None:
    first = np.array([0, rows])
    count = len(RowBatches(first, batch, 0, ranks))
    dealt = [[RowBatches(first, batch, rank, ranks)[i] for i in range(count)] for rank in range(ranks)]
    turns = [pick.row for turn in zip(*dealt, strict=True) for picks in turn for pick in picks]
    assert turns[:rows] == list(range(rows))
    assert set(turns[rows:]) <= {rows - 1}
    assert len(turns) - rows < batch * ranks


def test_a_refresh_tells_the_shards_that_the_ranks_will_read() -> None:
    first = np.array([0, 0, 4, 4, 10, 13])  # two shards are empty
    batches = [RowBatches(first, 2, rank, 2) for rank in range(2)]
    for number in range(len(batches[0]) + 1):
        rows = [pick.row for n in range(number, len(batches[0])) for each in batches for pick in each[n]]
        shards = (np.searchsorted(first, rows, "right") - 1).tolist()
        assert list(batches[1].upcoming_shards(number)) == list(dict.fromkeys(shards))


def test_a_refresh_fetches_shards_ahead(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, no workers: while the first batch is held, the other shards come."""
    monkeypatch.setattr("ummim.data.prefetch._PAUSE_SECONDS", 0.01)
    cache = ShardCache(tmp_path / "cache", 10**9)
    index = ShardIndex.open(shards, cache)
    data = DataConfig(str(shards), workers=0, image_size=32, streams=1, window=1)
    recipe: Any = SimpleNamespace(data=data, sampler=lambda: PlanSampler((4, 4), MaskConfig()), seed=0)
    batches = iter(whole_images(index, recipe, 2, World(0, 0, 1, torch.device("cpu"))))
    next(batches)
    deadline = time.monotonic() + 20
    while len(list((tmp_path / "cache" / "shards").glob("*.tar"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [cache.path(shard.sha256).exists() for shard in index.shards] == [True, True, False, False]
    assert sum(len(batch.keys) for batch in batches) == 24


def test_a_file_that_holds_no_maps_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "epoch-0001.npy"
    path.write_bytes(b"\x93NUMPY")
    for write in (lambda: None, lambda: np.save(path, np.zeros((2, 3, 3), np.float32)), path.unlink):
        write()
        with pytest.raises(CheckpointError, match="epoch-0001.npy"):
            check_maps(path, (2, 3, 3))
    np.save(path, np.zeros((2, 3, 3), np.float16))
    check_maps(path, (2, 3, 3))
