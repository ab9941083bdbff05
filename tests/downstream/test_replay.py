"""``ummim replay`` of a fine-tuning: a step's batch again, and a bad step alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.downstream.labelled import build_shards, write_recipe
from ummim.__main__ import main
from ummim.data import ShardIndex
from ummim.data.batch import read_tensors, write_tensors
from ummim.data.labelled import LabelledBatch, build_labelled_loader
from ummim.downstream.recipe import ClassifyRecipe
from ummim.downstream.run import classify
from ummim.engine import bad_steps, resume, zero
from ummim.engine.bad_steps import BadStepError
from ummim.engine.trainer import unwatched
from ummim.errors import UserError
from ummim.recipe_file import dump_recipe, load_recipe
from ummim.replay import replay

RICH = ("classify.mixup=0.8", "classify.cutmix=1.0", "classify.drop_path=0.5", "data.erasing=0.5", "micro_batch=2")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_shards(tmp_path_factory.mktemp("labelled"), val=3)
    return write_recipe(folder, folder / "run")


def loaded(recipe: Path, *words: str) -> ClassifyRecipe:
    return load_recipe(str(recipe), [*RICH, *words], ClassifyRecipe)


@pytest.fixture(scope="module")
def run(recipe: Path) -> Path:
    """What a run on two ranks leaves of itself, as far as replay looks."""
    folder = recipe.parent / "left"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_recipe(loaded(recipe)))
    told = {"world_size": 2, "shard_digest": ShardIndex.open(str(recipe.parent / "train")).digest}
    (folder / "environment.json").write_text(json.dumps(told))
    return folder


def test_a_step_is_what_the_ranks_trained_on(recipe: Path, run: Path) -> None:
    config, index = loaded(recipe), ShardIndex.open(str(recipe.parent / "train"))
    plan = config.plan(2, len(index))
    ranks = [list(build_labelled_loader(index, config.data, 0, plan, rank, 2)) for rank in (0, 1)]
    assert plan.accumulation == 2
    for step in (1, 5):
        found = replay(run, step)
        assert len(found.batches) == 4
        for (i, rank, _), mine in zip(found.picks, found.batches, strict=True):
            theirs: LabelledBatch = ranks[rank][(step - 1) * 2 + i]
            assert (mine.keys, mine.mixing) == (theirs.keys, theirs.mixing)
            assert torch.equal(mine.images, theirs.images) and torch.equal(mine.labels, theirs.labels)


def test_it_prints_labels_saves_and_draws(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet, saved = tmp_path / "sheet.png", tmp_path / "batch.safetensors"
    assert main(["replay", str(run), "--step", "4", "--out", str(sheet), "--save", str(saved)]) == 0
    _, _, head, *rows, digest = capsys.readouterr().out.splitlines()
    batch, told = LabelledBatch.load(saved)
    assert head.split() == ["position", "rank", "micro-batch", "label", "key"]
    assert [row.split()[3:] for row in rows] == [
        [str(label), key] for label, key in zip(batch.labels.tolist(), batch.keys, strict=True)
    ]
    assert digest == f"sha256 of pixels and labels: {told['digest']}"
    assert (told["step"], told["mixing"]) == (4, "0 mixing 1 0")
    assert batch.images.shape == (8, 3, 32, 32)
    assert sheet.stat().st_size > 0


@pytest.fixture(scope="module")
def bundle(recipe: Path, world: zero.World) -> Path:
    """Of a run whose loss leaps: two micro-batches of mixed images, with blocks skipped by chance."""
    words = ["micro_batch=4", "optim.base_lr=20", "optim.warmup_epochs=0", "bad_steps.spike=1.5", "zero_stage=0"]
    words.append(f"output={recipe.parent / 'leaping'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bad_steps, "SETTLED", 1)
        with pytest.raises(BadStepError, match="the loss leaps") as error:
            classify(loaded(recipe, *words), world, unwatched)
    resume._locks.pop().close()
    return Path(str(error.value).split("`ummim replay ")[1].split("`")[0])


def test_a_bad_steps_loss_is_the_same_to_the_bit(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(bundle)]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if line.startswith("step ")]
    assert [head.split(":")[0].split(", ")[2] for head in heads] == ["micro-batch 0", "micro-batch 1"]
    assert all("now, in fp32 (the same to the bit); gradient norm" in head for head in heads)
    assert sum("mixed with each other" in line for line in lines) == 2
    samples = [line.split() for line in lines if line.startswith("  ") and line.split()[0] not in ("sample", "images")]
    batches = [LabelledBatch.load(path)[0] for path in sorted(bundle.glob("rank-*.safetensors"))]
    labels = {key: str(label) for b in batches for key, label in zip(b.keys, b.labels.tolist(), strict=True)}
    assert {words[0]: words[2] for words in samples} == labels
    assert len(labels) == 8


@pytest.mark.parametrize("spoil", ["mixing", "labels", "micro_batch"])
def test_another_mixing_label_or_noise_is_another_loss(
    bundle: Path, spoil: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundle / "rank-0-1.safetensors"
    sound = path.read_bytes()
    tensors, told = read_tensors(path, ("images", "labels"))
    changes: dict[str, Any] = {"mixing": "another", "micro_batch": 2}
    if spoil in changes:
        told[spoil] = changes[spoil]
    else:
        tensors["labels"] = (tensors["labels"] + 1) % 3
    write_tensors(path, tensors, told)
    assert main(["replay", str(bundle)]) == 0
    path.write_bytes(sound)
    assert capsys.readouterr().out.count("the same to the bit") == 1


def test_what_cannot_be_replayed_says_why(recipe: Path, run: Path, tmp_path: Path) -> None:
    config = load_recipe(str(recipe), ["classify.protocol=knn", "classify.layer_decay=1"], ClassifyRecipe)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(config))
    (tmp_path / "environment.json").write_text((run / "environment.json").read_text())
    with pytest.raises(UserError, match="nearest neighbours are not trained, so there is no step"):
        replay(tmp_path, 1)
