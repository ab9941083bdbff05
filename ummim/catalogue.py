"""The packaged recipes as a catalogue: what was published for each, what we have seen of it, and what it costs.

``recipes/costs.json`` holds what takes long to count (benchmarks/recipe_costs.py writes it), ``recipes/status.json``
which recipes have been rehearsed (``ummim rehearse --record`` writes it).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ummim import __version__
from ummim.atomic import write_text
from ummim.downstream.recipe import ClassifyRecipe
from ummim.errors import UserError
from ummim.recipe import Recipe
from ummim.recipe_file import PACKAGED, load_recipe, packaged_evaluations, packaged_recipes
from ummim.run_config import RunConfig

if TYPE_CHECKING:
    from ummim.capacity.report import Cluster

COSTS, STATUS = PACKAGED / "costs.json", PACKAGED / "status.json"
PLANNED, REHEARSED, REPRODUCED = "planned", "rehearsed", "reproduced"
FAMILIES = {
    "vit": ("ViT", {192: "Ti", 384: "S", 768: "B", 1024: "L", 1280: "H"}),
    "relative_vit": ("ViT", {192: "Ti", 384: "S", 768: "B", 1024: "L", 1280: "H"}),
    "swin": ("Swin", {96: "T", 128: "B", 192: "L"}),
    "um_swin": ("Swin", {96: "T", 128: "B", 192: "L"}),
    "pvt": ("PVT", {64: "S"}),
}


@dataclass(frozen=True)
class Entry:
    """One recipe.

    Attributes:
        recipe: its name.
        evaluation: it fine-tunes or probes; else it pre-trains.
        method: of a pre-training, a file of ``ummim/methods``; of an evaluation, its protocol.
        backbone: the encoder's usual name, such as ViT-B/16; empty where the weights decide.
        epochs: length of the schedule.
        throw_ratio: PR-MIM's r.
        top1: accuracy published for it on ImageNet-1K, in percent; of a pre-training, after fine-tuning.
        source: who published it.
        status: ``planned``; ``rehearsed``: its shrunk form has gone from shards to a classifier; ``reproduced``: the
            published accuracy was reached by us.
        seen: version, commit and date of that; empty if planned.
        finetune: the evaluation that follows a pre-training.
        forward_gmac: multiply-adds of a forward pass for one image, in thousands of millions; of an evaluation, of the
            classifier at the recipe's image size.
        of_full: the same, in those of the method that throws nothing; of a pre-training.
        days, gpu_hours: of the whole run on the cluster that was asked for; of an evaluation, of its training alone
            or, of nearest neighbours, of one forward pass of all images.
        refused: why it cannot run on that cluster.
    """

    recipe: str
    evaluation: bool
    method: str
    backbone: str
    epochs: int
    throw_ratio: float
    top1: float | None
    source: str
    status: str
    seen: Mapping[str, str]
    finetune: str
    forward_gmac: float | None = None
    of_full: float | None = None
    days: float | None = None
    gpu_hours: float | None = None
    refused: str = ""


def catalogue(cluster: "Cluster | None" = None) -> list[Entry]:
    """All packaged recipes, pre-trainings first; with a cluster, what each takes on it.

    Raises:
        UserError: a cluster that cannot be.
    """
    costs, status = json.loads(COSTS.read_text()), read_status()
    if cluster is not None:
        cluster.assumed.check()
    entries = []
    for recipe in pre_trainings():
        name, cost = recipe.name, costs[recipe.name]
        values = {key: cost[key] for key in ("forward_gmac", "of_full")}
        values |= {} if cluster is None else on_cluster(recipe, cost["step"], cluster)
        method = type(recipe.method).__module__.rsplit(".", 1)[-1]
        known = _known(recipe, status.get(name, {}))
        encoder: Any = recipe.method.encoder  # type: ignore[attr-defined]
        entries.append(
            Entry(recipe=name, evaluation=False, method=method, backbone=backbone(encoder), finetune=linked(recipe),
                  throw_ratio=recipe.throw_ratio, **known, **values)
        )  # fmt: skip
    for evaluation in evaluations():
        name, cost = evaluation.name, costs[evaluation.name]
        names = ", ".join(sorted({backbone(encoder) for encoder in encoders_of(evaluation)}))
        values = {"forward_gmac": cost["forward_gmac"]}
        values |= {} if cluster is None else on_cluster(evaluation, cost["step"], cluster)
        entries.append(
            Entry(recipe=name, evaluation=True, method=evaluation.classify.protocol, backbone=names, finetune="",
                  throw_ratio=0.0, **_known(evaluation, status.get(name, {})), **values)
        )  # fmt: skip
    return entries


def _known(recipe: Recipe | ClassifyRecipe, status: Mapping[str, str]) -> dict[str, Any]:
    seen = dict(status)
    return {
        "epochs": recipe.epochs,
        "top1": recipe.published.top1,
        "source": recipe.published.source,
        "status": seen.pop("status", PLANNED),
        "seen": seen,
    }


def backbone(encoder: Any) -> str:
    """An encoder's usual name, such as ViT-B/16; other sizes by their width, such as Swin-32."""
    family, letters = FAMILIES[encoder.kind]
    width = encoder.embed_dims[0] if encoder.kind == "pvt" else encoder.embed_dim
    patch = f"/{encoder.patch_size}" if family == "ViT" else ""
    return f"{family}-{letters.get(width, width)}{patch}"


def linked(recipe: Recipe) -> str:
    """The evaluation that follows a pre-training; empty: none is named."""
    return recipe.finetune


@cache
def pre_trainings() -> tuple[Recipe, ...]:
    """All packaged pre-trainings; reading one takes a twentieth of a second."""
    return tuple(load_recipe(name) for name in packaged_recipes())


@cache
def evaluations() -> tuple[ClassifyRecipe, ...]:
    """All packaged evaluations."""
    return tuple(load_recipe(name, (), ClassifyRecipe) for name in packaged_evaluations())


def fine_tuned(evaluation: str) -> list[Recipe]:
    """The packaged pre-trainings that name an evaluation."""
    return [recipe for recipe in pre_trainings() if linked(recipe) == evaluation]


def encoders_of(evaluation: ClassifyRecipe) -> list[Any]:
    """The encoder configs that an evaluation is for: its own, else those of the pre-trainings linked to it."""
    if evaluation.classify.encoder is not None:
        return [evaluation.classify.encoder]
    return [recipe.method.encoder for recipe in fine_tuned(evaluation.name)]  # type: ignore[attr-defined]


def on_cluster(recipe: RunConfig, counted: Mapping[str, Any], cluster: "Cluster") -> dict[str, Any]:
    """Days and GPU hours of a run as ``ummim capacity`` has them, from what was counted of its step.

    counted: ``step`` of its costs: sums of parameters by optimizer group, frozen ones, bytes of buffers, and the
    activations of its own kind of checkpointing, of an evaluation without their bytes. Sums are all that time depends
    on at ZeRO stages 0 to 2, and it does not depend on what activations take in memory.
    """
    from ummim.capacity.activations import Activations, counted_as
    from ummim.capacity.evaluations import neighbours_on
    from ummim.capacity.gpus import peak_flops
    from ummim.capacity.report import Model, run, step_of
    from ummim.capacity.strategy import Shapes

    shapes = Shapes(tuple((n,) for n in counted["groups"]), (counted["frozen"],), counted["buffers"])
    kind = counted_as(recipe.activation_checkpointing)
    passes = {"saved": 0.0, "working": 0.0, "host": 0.0, **counted["activations"]}
    model = Model(recipe, shapes, 0, {kind: Activations(**passes)})
    try:
        if isinstance(recipe, ClassifyRecipe) and recipe.classify.protocol == "knn":
            return neighbours_on(recipe, passes, peak_flops(cluster.gpu, recipe.precision), cluster)
        plan = recipe.plan(cluster.world_size, recipe.expected_samples)
        found = run(model, plan, step_of(model, plan, cluster), cluster, asynchronous=recipe.checkpoint_async)
    except UserError as error:
        return {"refused": str(error)}
    return {"days": found["days"], "gpu_hours": found["gpu_hours"]}


def read_status() -> dict[str, dict[str, str]]:
    """Recipe -> ``status``, and the ``version``, ``commit`` and ``date`` that it is of."""
    found: dict[str, dict[str, str]] = json.loads(STATUS.read_text())
    return found


def record(name: str, commit: str | None, path: Path = STATUS) -> Path:
    """Write down that a packaged recipe has been rehearsed, now; returns the file.

    Raises:
        UserError: a recipe that is not packaged.
    """
    if name not in [*packaged_recipes(), *packaged_evaluations()]:
        raise UserError(f"--record: {name} is no packaged recipe; only those have a status")
    status = json.loads(path.read_text())
    if status.get(name, {}).get("status") != REPRODUCED:
        date = datetime.now(UTC).date().isoformat()
        status[name] = {"status": REHEARSED, "version": __version__, "commit": commit or "unknown", "date": date}
    write_text(path, json.dumps(dict(sorted(status.items())), indent=1) + "\n")
    return path


def as_json(entries: list[Entry]) -> str:
    """A JSON array of all entries."""
    return json.dumps([asdict(entry) for entry in entries], indent=1)
