"""``ummim replay``: a step's batch again, from the run's folder and a copy of its shards."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.conftest import TINY_MAE
from tests.data.pictures import write_tree
from ummim.__main__ import main
from ummim.data import Batch, ShardIndex, build_loader
from ummim.data.batch import PARTS
from ummim.errors import UserError
from ummim.recipe_file import dump_recipe, load_recipe
from ummim.replay import replay

RECIPE = TINY_MAE.replace("SHARDS", "gone") + "throw_ratio: 0.5\nseed: 3\n"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 labelled pictures in four shards: 3 steps of 8 an epoch."""
    from data_prep.__main__ import main as data_prep

    folder = tmp_path_factory.mktemp("data")
    tree = write_tree(folder / "images", each=13)
    assert data_prep(["build", str(tree), str(folder / "shards"), "--shard-count", "7", "--workers", "1"]) == 0
    return folder / "shards"


@pytest.fixture
def run(shards: Path, tmp_path: Path) -> Path:
    """What a run on two ranks leaves of itself, as far as replay looks."""
    return make_run(tmp_path / "run", shards, RECIPE)


def make_run(folder: Path, shards: Path, text: str, world_size: int = 2) -> Path:
    folder.mkdir()
    (folder / "tiny.yaml").write_text(text)
    recipe = load_recipe(str(folder / "tiny.yaml"), ["micro_batch=2", f"data.shards={shards}"])
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    environment = {"world_size": world_size, "shard_digest": ShardIndex.open(shards).digest}
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def trained_on(run: Path, shards: Path) -> Iterator[tuple[int, int, int, Batch]]:
    """(step from 1, micro-batch, rank, batch) of the whole run, by the training loader."""
    recipe, index = load_recipe(str(run / "recipe.yaml")), ShardIndex.open(shards)
    plan = recipe.plan(2, len(index))
    loaders = [build_loader(index, recipe.data, recipe.sampler(), recipe.seed, plan, rank, 2) for rank in (0, 1)]
    batches = [list(loader) for loader in loaders]
    for number in range(plan.total_steps * plan.accumulation):
        for rank in (0, 1):
            yield number // plan.accumulation + 1, number % plan.accumulation, rank, batches[rank][number]


def test_every_step_is_what_the_ranks_trained_on(run: Path, shards: Path) -> None:
    by_step: dict[int, list] = {}
    for step, i, rank, batch in trained_on(run, shards):
        by_step.setdefault(step, []).append((i, rank, batch))
    assert len(by_step) == 12
    for step in (1, 3, 4, 12):
        found = replay(run, step)
        assert [(i, rank) for i, rank, _ in found.picks] == [(i, rank) for i, rank, _ in by_step[step]]
        for mine, (_, _, theirs) in zip(found.batches, by_step[step], strict=True):
            assert mine.keys == theirs.keys
            assert torch.equal(mine.images, theirs.images)
            assert torch.equal(mine.labels, theirs.labels)
            for part in PARTS:
                assert torch.equal(getattr(mine.plan, part), getattr(theirs.plan, part))


def test_the_digest_is_of_the_batch_and_not_of_the_ranks(run: Path, shards: Path, tmp_path: Path) -> None:
    alone = make_run(tmp_path / "alone", shards, RECIPE, world_size=1)
    assert replay(run, 5).digest() == replay(alone, 5).digest()
    other = make_run(tmp_path / "other", shards, RECIPE.replace("seed: 3", "seed: 4"))
    digests = [replay(run, 5).digest(), replay(run, 6).digest(), replay(other, 5).digest()]
    assert len(set(digests)) == 3
    plain = b""
    for batch in replay(run, 5).batches:
        for i in range(len(batch.keys)):
            plain += batch.images[i].numpy().tobytes()
            plain += b"".join(getattr(batch.plan, part)[i].numpy().tobytes() for part in PARTS)
    assert hashlib.sha256(plain).hexdigest() == digests[0]


def test_it_prints_saves_and_draws(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path / "a" / "sheet.png"), "--save", str(tmp_path / "b" / "batch.safetensors")]
    assert main(["replay", str(run), "--step", "4", *arguments]) == 0
    printed = capsys.readouterr().out.splitlines()
    found = replay(run, 4)
    keys = [key for batch in found.batches for key in batch.keys]
    assert printed[0] == "step 4: epoch 2, step 1 of 3 in it"
    assert printed[1] == "seed 3, 8 samples, world size 2"
    rows = [line.split() for line in printed[3:-1]]
    assert [row[0] for row in rows] == [str(i) for i in range(8)]
    assert [(row[1], row[2]) for row in rows] == [(r, m) for m in "01" for r in "01" for _ in range(2)]
    assert [row[3] for row in rows] == keys
    assert printed[-1] == f"sha256 of pixels and masks: {found.digest()}"
    with safe_open(tmp_path / "b" / "batch.safetensors", "pt") as file:
        assert json.loads(file.metadata()["keys"]) == keys
        assert json.loads(file.metadata()["digest"]) == found.digest()
        assert json.loads(file.metadata()["epoch"]) == 1
        assert torch.equal(file.get_tensor("images"), torch.cat([batch.images for batch in found.batches]))
        assert file.get_tensor("thrown").shape == (8, 8)
    assert (tmp_path / "b" / "batch.safetensors").stat().st_mode & 0o444 == 0o444
    sheet = np.asarray(Image.open(tmp_path / "a" / "sheet.png"))
    assert sheet.shape == (24 + 3 * 34, 360 + 2, 3)
    cell = sheet[24 : 24 + 32, 2 : 2 + 32]  # the first image: 4x4 tokens of 8 pixels
    image = found.batches[0].images[0].permute(1, 2, 0).numpy()
    for token in range(16):
        at = np.s_[token // 4 * 8 : token // 4 * 8 + 8, token % 4 * 8 : token % 4 * 8 + 8]
        assert np.array_equal(cell[at], image[at]) == (token in found.batches[0].plan.visible[0])


def test_the_shards_may_have_moved(run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = replay(run, 2).digest()
    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)
    assert main(["replay", str(run), "--step", "2", "--shards", str(moved)]) == 0
    assert expected in capsys.readouterr().out
    (moved / "index.json").write_text((moved / "index.json").read_text() + " ")
    assert main(["replay", str(run), "--step", "2", "--shards", str(moved)]) == 2
    assert f"{moved} has the digest" in capsys.readouterr().err


def overwrite(shards: Path, row: int) -> None:
    index = ShardIndex.open(shards)
    with (shards / index.shards[index.table["shard"][row]].name).open("r+b") as file:
        file.seek(int(index.table["offset"][row]))
        file.write(b"\0" * 64)


def test_samples_that_the_run_replaced_are_replaced_and_no_others(
    run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run on damaged shards, replayed on damaged ones and on sound ones; a run on sound ones, on damaged ones."""
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    row = replay(run, 1).picks[1][2][0].row
    overwrite(damaged, row)
    faults = [(step, fault) for step, _, _, batch in trained_on(run, damaged) for fault in batch.faults if step < 4]
    assert [(step, fault.row) for step, fault in faults] == [(1, row)]
    key = ShardIndex.open(shards).key(row)

    assert main(["replay", str(run), "--step", "1", "--shards", str(damaged)]) == 2
    assert f"key {key!r} at byte" in (error := capsys.readouterr().err) and "the run has read it" in error
    log = "".join(json.dumps({"step": step, **fault._asdict()}) + "\n" for step, fault in faults)
    (run / "data_faults-1.jsonl").write_text(log + '{"step": 1, "ro')
    found = [replay(run, 1, place) for place in (None, str(damaged))]
    assert found[0].digest() == found[1].digest()
    (instead,) = (line for line in found[0].lines() if "in place of" in line)
    assert instead.endswith(f"  {faults[0][1].replacement}  (in place of {key})")
    assert key not in [key for batch in found[0].batches for key in batch.keys]
    assert "in place of" not in "".join(replay(run, 2).lines())


@pytest.mark.parametrize(("step", "spoil", "part"), [
    (0, None, "--step 0: the run has steps 1 to 12"),
    (13, None, "--step 13: the run has steps 1 to 12"),
    (1, "recipe.yaml", "recipe.yaml is missing: give the folder of a run"),
    (1, "environment.json", "environment.json is missing: give the folder of a run"),
])  # fmt: skip
def test_mistakes_are_one_message(
    step: int, spoil: str | None, part: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if spoil:
        (run / spoil).unlink()
    assert main(["replay", str(run), "--step", str(step)]) == 2
    assert part in capsys.readouterr().err
    (run / "environment.json").write_text("{}")
    assert main(["replay", str(run), "--step", "1"]) == 2


def test_attention_driven_masks_need_the_runs_maps(shards: Path, tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "amt", shards, TINY_MAE.replace("name: mae", "name: amt\n  attention: {refresh_epochs: 2}")
    )
    plain = make_run(tmp_path / "mae", shards, TINY_MAE)
    assert replay(run, 6).digest() == replay(plain, 6).digest()  # before the first refresh
    with pytest.raises(UserError, match="epoch-0002.npy is missing: the masks of step 7 were drawn from"):
        replay(run, 7)
    (run / "attention").mkdir()
    rng = np.random.default_rng(0)
    np.save(run / "attention" / "epoch-0002.npy", rng.random((26, 4, 4)).astype(np.float16))
    first, second = replay(run, 7), replay(plain, 7)
    assert [batch.keys for batch in first.batches] == [batch.keys for batch in second.batches]
    assert torch.equal(first.batches[0].images, second.batches[0].images)
    assert not torch.equal(first.batches[0].plan.visible, second.batches[0].plan.visible)
