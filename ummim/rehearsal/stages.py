"""The stages of a rehearsal, each of them this package's own commands on a shrunk recipe."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ummim.downstream.recipe import ClassifyRecipe
from ummim.engine.checkpoint import steps
from ummim.errors import EXIT_USER
from ummim.recipe import Recipe
from ummim.rehearsal.processes import Job, StageFailed, Start
from ummim.rehearsal.shrink import LONG, STEPS, overrides, shrink
from ummim.run_config import RunConfig

IMAGES = Path(__file__).resolve().parents[1] / "sample_images"
TRAIN_PER_CLASS, VAL_PER_CLASS = 6, 3
RANKS = 2
LEAVE_SECONDS = 90  # of the other rank, after one was killed
SUFFIX = {"safetensors": "encoder.safetensors", "timm": "timm.safetensors", "official": "official.pth",
          "huggingface": "huggingface"}  # fmt: skip


@dataclass
class Rehearsal:
    """One recipe in one folder.

    Attributes:
        given: the recipe as given: packaged name or path.
        recipe: the same, loaded.
        folder: everything is written below it.
        train: the path of train.py.
        begin: starts a process.
        fine_tuning: the evaluation that follows a pre-training, as given, and loaded; None: none.
        kind: of an evaluation's fresh encoder.
        extra: overrides of the user's.
    """

    given: str
    recipe: RunConfig
    folder: Path
    train: Path
    begin: Start
    fine_tuning: tuple[str, ClassifyRecipe] | None = None
    kind: str = "vit"
    extra: tuple[str, ...] = ()
    exports: list[Path] = field(default_factory=list)

    def stages(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """Names of the stages, and functions that go through them and tell what was seen."""
        yield "data", self.data
        yield "undisturbed", self.undisturbed
        if self.is_knn:
            yield "other ranks", self.other_ranks
            return
        yield "killed", self.killed
        yield "resumed", self.resumed
        yield "export", self.export
        yield "load again", self.load_again
        if self.fine_tuning is not None:
            yield "fine-tuning", self.fine_tune

    def data(self) -> str:
        """Shards of the packaged photographs: six of each class to train on, three to evaluate on."""
        for source in sorted(path for path in IMAGES.iterdir() if path.is_dir()):
            for number, image in enumerate(sorted(source.glob("*.jpg"))[: TRAIN_PER_CLASS + VAL_PER_CLASS]):
                name = "train" if number < TRAIN_PER_CLASS else "val"
                target = self.folder / "images" / name / source.name
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(image, target)
        for name in ("train", "val"):
            words = ["-m", "data_prep", "build", self.folder / "images" / name, self.shards(name)]
            self.job(f"data-{name}", [*words, "--shard-count", 16, "--workers", 1]).finish()
        return f"{9 * TRAIN_PER_CLASS} photographs to train on, {9 * VAL_PER_CLASS} to evaluate on"

    def undisturbed(self) -> str:
        self.ranks("undisturbed", RANKS).finish()
        if self.is_knn:
            return f"top-1 {self.evaluation('undisturbed')['top1']:.1f}% on {RANKS} ranks"
        found = losses(self.folder / "undisturbed")
        if list(found) != list(range(1, STEPS + 1)) or not all(map(math.isfinite, found.values())):
            raise StageFailed(f"{self.folder / 'undisturbed/metrics.jsonl'}: not {STEPS} finite losses: {found}")
        return f"{STEPS} steps on {RANKS} ranks, loss {found[1]:.4f} to {found[STEPS]:.4f}"

    def other_ranks(self) -> str:
        """Nearest neighbours train nothing that could be killed and go on."""
        self.ranks("alone", 1).finish()
        seen = [self.evaluation(name) for name in ("undisturbed", "alone")]
        if seen[0]["top1"] != seen[1]["top1"]:
            raise StageFailed(f"top-1 is {seen[0]['top1']} on {RANKS} ranks and {seen[1]['top1']} on 1: {self.folder}")
        return "the same top-1 on 1 rank"

    def killed(self) -> str:
        """kill -9 to a rank of a longer run once it has a checkpoint; the other one ends by itself."""
        run = self.folder / "killed"
        job = self.ranks("killed", RANKS, {"max_steps": LONG})
        try:
            while job.running() and not steps(run / "checkpoints"):
                time.sleep(0.01)
            if not job.running():
                job.finish()
                raise job.failed("ended before a rank could be killed")
            job.processes[1].kill()
            took = job.left(0, LEAVE_SECONDS)
        finally:
            job.end()
        if took is None:
            raise job.failed(f"rank 0 went on for {LEAVE_SECONDS} s after rank 1 was killed")
        if job.processes[0].poll() == 0:
            raise job.failed("ended before a rank could be killed")
        return f"rank 1 of {RANKS} killed after the checkpoint of step {newest(run)}; rank 0 ended {took:.1f} s later"

    def resumed(self) -> str:
        """The same run on one rank: it goes on from its checkpoint, and its losses are the undisturbed run's."""
        run = self.folder / "killed"
        begun = newest(run)
        job = self.ranks("killed", 1, log="resumed")
        job.finish()
        if f"after step {begun} of" not in job.logs[0].read_text():
            raise job.failed(f"did not say that it went on from step {begun}")
        seen, expected = losses(run), losses(self.folder / "undisturbed")
        if list(seen) != list(expected):
            raise StageFailed(f"{run / 'metrics.jsonl'}: steps {list(seen)} instead of {list(expected)}")
        before = [step for step in seen if step <= begun and seen[step] != expected[step]]
        if before:
            raise StageFailed(f"{run}: steps {before}, before the kill, are not those of {self.folder / 'undisturbed'}")
        differences = [abs(seen[step] - expected[step]) / max(abs(expected[step]), 1e-12) for step in seen]
        largest = max(differences, key=lambda value: (math.isnan(value), value))
        allowed = tolerance(self.recipe)
        text = f"losses differ by at most {largest:.1e} from the undisturbed run's (allowed: {allowed:.0e})"
        if not largest <= allowed:
            pairs = "\n".join(f"  | {step}: {expected[step]:.6g} {seen[step]:.6g}" for step in seen)
            raise StageFailed(f"{run}: {text}\nstep: undisturbed, resumed\n{pairs}")
        return f"from step {begun} to {STEPS} on 1 rank; {text}"

    def export(self) -> str:
        """Every format; an encoder that a library has no counterpart of is refused with exit code 2, and why."""
        told, refused = [], []
        for form, name in SUFFIX.items():
            out = self.folder / "exports" / name
            job = self.job(f"export-{form}", ["-m", "ummim", "export", self.folder / "killed", out, "--format", form])
            must = form == "safetensors" and isinstance(self.recipe, Recipe)
            if job.finish((0,) if must else (0, EXIT_USER)) == 0:
                told.append(form)
                self.exports.append(out)
            else:
                lines = job.logs[0].read_text().splitlines()
                why = next((line for line in lines if line.startswith("ummim: error: ")), "no reason given")
                refused.append(f"no {form}: {why.removeprefix('ummim: error: ')}")
        return "; ".join([", ".join(told) or "none", *refused])

    def load_again(self) -> str:
        for out in self.exports:
            self.job(f"verify-{out.name}", ["-m", "ummim", "verify-export", out]).finish()
        return f"{len(self.exports)} of {len(self.exports)} give the model's outputs"

    def fine_tune(self) -> str:
        """Two steps of the linked evaluation on the exported encoder, and the accuracy."""
        assert self.fine_tuning is not None
        name, recipe = self.fine_tuning
        side = shrink(self.recipe).changes["data.image_size"]
        changes = shrink(recipe, compared=False).changes | {
            "classify.weights": str(self.exports[0]),
            "classify.encoder": None,
            "max_steps": 2,
            "data.image_size": side,
            "data.eval_resize": None if recipe.data.eval_resize is None else side * 8 // 7,
        }
        Job(self.begin, "fine-tuning", self.words(name, "fine-tuning", changes), self.logs, RANKS).finish()
        found = self.evaluation("fine-tuning")
        return f"{name}: 2 steps on {RANKS} ranks; top-1 {found['top1']:.1f}% of {found['images']} photographs"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def shards(self, name: str) -> Path:
        return self.folder / "shards" / name

    def job(self, name: str, words: Sequence[object]) -> Job:
        """One process of its own."""
        return Job(self.begin, name, words, self.logs)

    def ranks(self, run: str, count: int, changes: Mapping[str, Any] | None = None, log: str | None = None) -> Job:
        """The shrunk recipe on some ranks, into the folder ``run``."""
        shrunk = shrink(self.recipe, self.kind).changes
        return Job(self.begin, log or run, self.words(self.given, run, {**shrunk, **(changes or {})}), self.logs, count)

    def words(self, recipe: str, run: str, changes: Mapping[str, Any]) -> list[object]:
        """The command line of train.py."""
        places = {"output": str(self.folder / run), "data.shards": str(self.shards("train"))}
        if any(key.startswith("classify.") for key in changes):
            places["classify.val_shards"] = str(self.shards("val"))
        return [self.train, recipe, *self.extra, *overrides({**changes, **places})]

    def evaluation(self, run: str) -> dict[str, Any]:
        """A run's ``evaluation.json``. Raises StageFailed without one."""
        try:
            found: dict[str, Any] = json.loads((self.folder / run / "evaluation.json").read_text())
        except (OSError, ValueError) as error:
            raise StageFailed(f"{self.folder / run / 'evaluation.json'}: {error}") from None
        return found

    @property
    def is_knn(self) -> bool:
        """Nearest neighbours: nothing is trained."""
        return isinstance(self.recipe, ClassifyRecipe) and self.recipe.classify.protocol == "knn"


def tolerance(recipe: RunConfig) -> float:
    """Largest relative difference of a loss after a resumption on other ranks, where sums are rounded in another order.

    Wider in bf16, whose roundings grow from step to step (0.005 was seen), and where masks follow attention, for a
    weight rounded otherwise may mask another token. A resumption that lost AdamW's moments differed by 0.03.
    """
    follows = isinstance(recipe, Recipe) and recipe.method.attention is not None
    return 1e-5 if recipe.precision == "fp32" and not follows else 1e-2


def losses(run: Path) -> dict[int, float]:
    """Optimizer step -> loss, of a run. Raises StageFailed for a step that stands there twice."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {record["step"]: record["loss"] for record in records}
    if len(found) != len(records):
        raise StageFailed(f"{run / 'metrics.jsonl'}: a step stands there twice")
    return found


def newest(run: Path) -> int:
    """The optimizer step of a run's newest checkpoint."""
    return max(int(path.name.removeprefix("step-")) for path in steps(run / "checkpoints"))
