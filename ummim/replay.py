"""Read a step's batch of a run again: its sample keys, crops, masks or labels, wherever the same shards are.

The order is a pure function of (seed, epoch, index), crop and mask of (seed, epoch, key), so neither the model nor the
run's machines are needed. How a fine-tuning mixes images follows from seed, step and micro-batch. Samples that the run
could not read, and replaced, are in its ``data_faults`` files.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ummim.attention_maps import FOLDER, check_maps
from ummim.data import Batch, Loader, ShardIndex
from ummim.data.attention import AttentionMaps
from ummim.data.augment_labelled import seeded
from ummim.data.batch import PARTS
from ummim.data.labelled import LabelledBatch, LabelledSamples
from ummim.data.order import MicroBatches, Pick
from ummim.data.samples import Samples
from ummim.downstream.recipe import ClassifyConfig, ClassifyRecipe
from ummim.downstream.task import mixing
from ummim.errors import DataError, UserError
from ummim.masking import AttentionSampler
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe
from ummim.run_config import RunConfig
from ummim.run_plan import RunPlan
from ummim.visualize import KEPT, SECONDARY, THROWN, VISIBLE, save_figure

SHEET = 4096  # most pixels from left to right of the contact sheet
_GAP, _HEAD = 2, 24  # pixels between its cells, and above them
PARTS_DRAWN = [("secondary", SECONDARY), ("kept", KEPT), ("thrown", THROWN)]
AnyBatch = Batch | LabelledBatch


@dataclass(frozen=True)
class Replay:
    """A step's global batch.

    Attributes:
        recipe: the run's, a pre-training's or an evaluation's that trains.
        plan: its batch arithmetic.
        index_digest: of the shards.
        step: optimizer step; the run's first is 1, as in metrics.jsonl.
        picks: what each rank read, in the order of the global batch: (micro-batch, rank, samples).
        batches: their contents, ``Batch`` or, of an evaluation, ``LabelledBatch``.
    """

    recipe: Recipe | ClassifyRecipe
    plan: RunPlan
    index_digest: str
    step: int
    picks: list[tuple[int, int, list[Pick]]]
    batches: list[Any]

    @property
    def epoch(self) -> int:
        """Counted from 0, as in the samples' seeds."""
        return (self.step - 1) // self.plan.steps_per_epoch

    def digest(self) -> str:
        """SHA-256 (hex) of each sample's pixels, visible, secondary, kept and thrown, or pixels and label, before they
        are mixed, one sample after the other: the same for any ranks."""
        digest = hashlib.sha256()
        for batch in self.batches:
            for sample in zip(*(values.numpy() for values in columns(batch).values()), strict=True):
                for values in sample:
                    digest.update(values.tobytes())
        return digest.hexdigest()

    def lines(self) -> Iterator[str]:
        """What ``ummim replay`` prints: the step's place in the run, a line for each sample, the digest."""
        in_epoch = (self.step - 1) % self.plan.steps_per_epoch + 1
        yield f"step {self.step}: epoch {self.epoch + 1}, step {in_epoch} of {self.plan.steps_per_epoch} in it"
        yield f"seed {self.recipe.seed}, {self.plan.global_batch} samples, world size {self.plan.world_size}"
        labelled = isinstance(self.recipe, ClassifyRecipe)
        yield f"position  rank  micro-batch  {'label  ' * labelled}key"
        for (i, rank, picks), batch in zip(self.picks, self.batches, strict=True):
            bad = {fault.row: fault.key for fault in batch.faults}
            for pick, key, label in zip(picks, batch.keys, batch.labels.tolist(), strict=True):
                instead = f"  (in place of {bad[pick.row]})" if pick.row in bad else ""
                yield f"{pick.position:8d}  {rank:4d}  {i:11d}  {f'{label:5d}  ' * labelled}{key}{instead}"
        yield f"sha256 of pixels and {'labels' if labelled else 'masks'}: {self.digest()}"

    def save(self, path: Path) -> None:
        """Write the batch as safetensors: images (B, 3, S, S) uint8, labels (B,), and the plan's visible, secondary,
        kept and thrown, if it has one; keys and the step's place in the run are in the file's metadata. Images of a
        fine-tuning are not mixed yet: ``mixing`` there is the seed of that."""
        told: dict[str, Any] = {
            "step": self.step,
            "epoch": self.epoch,
            "seed": self.recipe.seed,
            "shard_digest": self.index_digest,
            "digest": self.digest(),
        }
        joined(self.batches).save(path, told)

    def draw(self, path: Path) -> None:
        """Write a contact sheet: the crops in order, masked tokens tinted by what the plan makes of them; of a
        fine-tuning, mixed as they were trained on."""
        count = sum(len(batch.keys) for batch in self.batches)
        columns = ceil(sqrt(count))
        side = min(self.recipe.data.image_size, SHEET // columns - _GAP)
        step = side + _GAP
        sheet = Image.new("RGB", (max(columns * step, 360) + _GAP, _HEAD + ceil(count / columns) * step), "white")
        pictures = (cell for batch in self.batches for cell in self._cells(batch))
        for i, picture in enumerate(pictures):
            small = picture.resize((side, side), Image.Resampling.BOX)
            sheet.paste(small, (_GAP + i % columns * step, _HEAD + i // columns * step))
        pen, font, x = ImageDraw.Draw(sheet), ImageFont.load_default(size=12), float(_GAP)
        parts = [] if isinstance(self.recipe, ClassifyRecipe) else PARTS_DRAWN
        for text, colour in [(f"step {self.step}", None), *parts]:
            if colour:
                pen.rectangle((x, 7, x + 10, 17), fill=colour)
                x += 14
            pen.text((x, 4), text, fill="black", font=font)
            x += 16 + pen.textlength(text, font=font)
        save_figure(sheet, path)

    def _cells(self, batch: AnyBatch) -> Iterator[Image.Image]:
        if isinstance(batch, Batch):
            return tinted(batch)
        assert isinstance(self.recipe, ClassifyRecipe)
        return mixed(batch, self.recipe.classify)


def columns(batch: AnyBatch) -> dict[str, Tensor]:
    """By name, what a batch's samples are made of: pixels, and the ids of their mask plans or their labels."""
    if isinstance(batch, Batch):
        return {"images": batch.images, **{part: getattr(batch.plan, part) for part in PARTS}}
    return {"images": batch.images, "labels": batch.labels}


def joined(batches: list[AnyBatch]) -> AnyBatch:
    """The batches of one step as one."""
    first, keys = batches[0], [key for batch in batches for key in batch.keys]
    images, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "labels"))
    if isinstance(first, LabelledBatch):
        return LabelledBatch(images, labels, keys, first.mixing)
    parts: dict[str, Any] = {part: torch.cat([columns(batch)[part] for batch in batches]) for part in PARTS}
    return Batch(images, replace(first.plan, shared=None, **parts), labels, keys)


def mixed(batch: LabelledBatch, config: ClassifyConfig) -> Iterator[Image.Image]:
    """The images of a micro-batch, mixed with each other as the step mixed them."""
    images, mixer = batch.images.float(), mixing(config)
    if mixer is not None:
        with seeded(batch.mixing):
            images, _ = mixer(images, batch.labels)
    for image in images:
        yield Image.fromarray(image.round().byte().permute(1, 2, 0).numpy())


def tinted(batch: Batch) -> Iterator[Image.Image]:
    """The images of a batch; tokens that the encoder does not see take the colour of their part in the plan."""
    plan, (h, w) = batch.plan, batch.plan.grid
    part = torch.zeros(plan.batch_size, h * w, dtype=torch.int64)
    part.scatter_(1, plan.visible, plan.secondary.long())
    part.scatter_(1, plan.kept, 2).scatter_(1, plan.thrown, 3)
    palette = torch.tensor([VISIBLE, SECONDARY, KEPT, THROWN], dtype=torch.float32)
    for image, tokens in zip(batch.images, part.view(-1, h, w), strict=True):
        cell = image.shape[1] // h
        pixels: Tensor = tokens.repeat_interleave(cell, 0).repeat_interleave(cell, 1)  # (S, S)
        plain = image.permute(1, 2, 0).float()
        mixed = torch.where(pixels[:, :, None] > 0, 0.45 * plain + 0.55 * palette[pixels], plain)
        yield Image.fromarray(mixed.round().byte().numpy())


def replay(run: Path, step: int, shards: str | None = None) -> Replay:
    """Read the batch of ``step`` (from 1) of the run in folder ``run`` again.

    ``shards``: where the shards are, if not where the recipe says.

    Raises:
        UserError: no run there, no such step, a k-NN evaluation, which has none, or attention maps that the masks need
            and that are gone.
        DataError: other shards, or a sample that the run has read and that cannot be read here.
    """
    recipe, environment = _read_run(run)
    if shards is not None:
        recipe = replace(recipe, data=replace(recipe.data, shards=shards, cache=None))  # type: ignore[arg-type]
    index = ShardIndex.open(recipe.data.shards, recipe.data.shard_cache())
    expected = environment["shard_digest"]
    if index.digest != expected:
        raise DataError(
            f"{index.place} has the digest {index.digest[:12]}, the run's shards had {expected[:12]}: "
            "name a copy of those with --shards"
        )
    plan = recipe.plan(environment["world_size"], len(index))
    if not 1 <= step <= plan.total_steps:
        raise UserError(f"--step {step}: the run has steps 1 to {plan.total_steps}")
    layout = (plan.accumulation, plan.world_size, plan.micro_batch)
    ranks = [
        MicroBatches(index, recipe.seed, recipe.data.streams, recipe.data.window, layout, rank, plan.total_steps)
        for rank in range(plan.world_size)
    ]
    picks = [
        (i, rank, ranks[rank][(step - 1) * plan.accumulation + i])
        for i in range(plan.accumulation)
        for rank in range(plan.world_size)
    ]
    bad = _bad_rows(run, step)
    samples: Samples | LabelledSamples
    if isinstance(recipe, ClassifyRecipe):
        samples = LabelledSamples(index, recipe.data, recipe.seed, plan.global_batch, bad, sparse=True)
    else:
        attention = _attention_maps(run, step, recipe, plan, len(index))
        samples = Samples(index, recipe.data, recipe.sampler(), recipe.seed, attention=attention, bad=bad, sparse=True)
    workers = min(recipe.data.workers, os.cpu_count() or 1)
    batches: list[Any] = list(Loader(samples, [each for _, _, each in picks], workers))
    for fault in (fault for batch in batches for fault in batch.faults if fault.row not in bad):
        raise DataError(
            f"{fault.shard}: key {fault.key!r} at byte {fault.byte}: {fault.reason}; the run has read it, so this "
            "cannot be its batch: mend the shard, or name a sound copy with --shards"
        )
    return Replay(recipe, plan, index.digest, step, picks, batches)


def _read_run(run: Path) -> tuple[Recipe | ClassifyRecipe, dict[str, Any]]:
    for name in ("recipe.yaml", "environment.json"):
        if not (run / name).is_file():
            raise UserError(f"{run / name} is missing: give the folder of a run")
    recipe: Any = load_recipe(str(run / "recipe.yaml"), (), RunConfig)
    if isinstance(recipe, ClassifyRecipe) and recipe.classify.protocol == "knn":
        raise UserError(f"{run}: nearest neighbours are not trained, so there is no step to replay")
    try:
        environment = json.loads((run / "environment.json").read_text())
        return recipe, {name: kind(environment[name]) for name, kind in (("world_size", int), ("shard_digest", str))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run / 'environment.json'} cannot be used ({type(error).__name__}: {error})") from None


def _bad_rows(run: Path, step: int) -> set[int]:
    """The rows that the run could not read in ``step``."""
    bad: set[int] = set()
    for path in sorted(run.glob("data_faults*.jsonl")):
        for line in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
                if record["step"] == step:
                    bad.add(int(record["row"]))
            except (ValueError, KeyError, TypeError):
                continue  # torn by a kill
    return bad


def _attention_maps(run: Path, step: int, recipe: Recipe, plan: RunPlan, rows: int) -> AttentionMaps | None:
    """What the masks of ``step`` were drawn from, if from attention maps."""
    config = recipe.method.attention
    refreshed = 0 if config is None else (step - 1) // plan.steps_per_epoch // config.refresh_epochs
    if config is None or refreshed == 0:
        return None
    path = run / FOLDER / f"epoch-{refreshed * config.refresh_epochs:04d}.npy"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: the masks of step {step} were drawn from the attention maps in it, and only the run "
            "that computed them has them"
        )
    grid = recipe.method.mask_grid(recipe.data.image_size)
    check_maps(path, (rows, *grid))
    return AttentionMaps(path, AttentionSampler(grid, config), recipe.data.image_size, config.legacy_crop)
