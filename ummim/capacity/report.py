"""What ``ummim capacity`` calculates for a recipe on a cluster."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ummim.capacity.activations import KINDS, Activations, counted_as, largest_parameters, measure
from ummim.capacity.communication import collectives
from ummim.capacity.failures import Checkpointing, simulated_optimum
from ummim.capacity.gpus import Assumptions, Gpu, peak_flops
from ummim.capacity.memory import Memory, rank_memory
from ummim.capacity.states import state_bytes
from ummim.capacity.strategy import STAGES, Shapes, Stage, strategy_of
from ummim.capacity.throughput import StepTime, step_time
from ummim.cost import build_on_meta
from ummim.errors import RecipeError, UserError
from ummim.recipe import Recipe
from ummim.run_config import RunConfig
from ummim.run_plan import RunPlan

STATE_BYTES = 12  # of a trained weight in a checkpoint: itself and AdamW's moments, in float32


@dataclass(frozen=True)
class Model:
    """What is counted of a recipe once, whatever the cluster."""

    recipe: RunConfig
    shapes: Shapes
    largest: int
    activations: dict[str, Activations]

    @classmethod
    def of(cls, recipe: Recipe) -> Model:
        """Takes some seconds: see ``activations.measure``."""
        method = build_on_meta(recipe)
        kinds = {kind: measure(recipe, kind) for kind in KINDS}
        return cls(recipe, Shapes.of(method), largest_parameters(method), kinds)


@dataclass(frozen=True)
class Cluster:
    """``nodes`` of ``per_node`` GPUs each, and what is assumed of them."""

    nodes: int
    per_node: int
    gpu: Gpu
    assumed: Assumptions

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node


def report(
    recipe: Recipe, cluster: Cluster, measured: float | None = None, asynchronous: bool = True
) -> dict[str, Any]:
    """The object of ``ummim capacity --json``; docs/scaling.md explains its keys.

    measured: images/s that one such GPU was seen to train with this recipe, alone; takes the place of the assumed
    efficiency. asynchronous: checkpoints are written beside training.

    Raises RecipeError for a batch that the ranks do not divide, UserError for a cluster that cannot be.
    """
    if cluster.nodes < 1 or cluster.per_node < 1:
        raise UserError("--nodes and --gpus-per-node: give at least 1")
    cluster.assumed.check()
    plan = recipe.plan(cluster.world_size, recipe.expected_samples)
    peak = peak_flops(cluster.gpu, recipe.precision)
    model = Model.of(recipe)
    if measured is not None:
        cluster = replace(cluster, assumed=replace(cluster.assumed, efficiency=_efficiency(model, peak, measured)))
    memory = memory_of(model, plan, cluster, recipe.zero_stage, counted_as(recipe.activation_checkpointing))
    largest = largest_micro_batches(model, plan, cluster)
    step = step_of(model, plan, cluster)
    return {
        "recipe": recipe.name,
        "cluster": {
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.per_node,
            "gpu": asdict(cluster.gpu),
            "peak_flops": peak,
            "efficiency": "assumed" if measured is None else "measured",
            "assumed": asdict(cluster.assumed),
        },
        "precision": recipe.precision,
        "zero_stage": recipe.zero_stage,
        "activation_checkpointing": recipe.activation_checkpointing,
        "plan": asdict(plan),
        "memory": {
            "components": memory.components,
            "update": memory.update,
            "total": memory.total,
            "available": memory.available,
            "fits": memory.fits,
            "host": memory.host,
            "disk": memory.disk,
        },
        "largest_micro_batch": largest,
        "advice": advice(recipe, plan, memory, largest),
        "step": {**asdict(step), "total": step.total, "images_per_second": step.images_per_second},
        "communication": [
            {**asdict(c), "sent": c.sent(cluster.world_size)} for c in _collectives(model, plan, cluster)
        ],
        "data": _data(recipe, plan, step, cluster),
        "scaling": scaling(model, cluster),
        "checkpoints": _checkpoints(model, plan, step, cluster, asynchronous),
        "run": run(model, plan, step, cluster, asynchronous),
    }


def _efficiency(model: Model, peak: float, measured: float) -> float:
    kind = counted_as(model.recipe.activation_checkpointing)
    found = measured * model.activations[kind].flops / peak
    if not 0 < found <= 1:
        raise UserError(
            f"--measured-images-per-second {measured:g}: that would be {found:.0%} of the GPU's peak; "
            "give the images/s of one GPU"
        )
    return found


def memory_of(model: Model, plan: RunPlan, cluster: Cluster, stage: Stage, kind: str) -> Memory:
    """Memory of a rank under a ZeRO stage and a kind of activation checkpointing."""
    return rank_memory(
        shapes=model.shapes,
        largest=model.largest,
        strategy=strategy_of(model.recipe, plan, stage),
        activations=model.activations[kind],
        micro_batch=plan.micro_batch,
        image_size=model.recipe.data.image_size,
        world_size=plan.world_size,
        available=cluster.gpu.memory,
        assumed=cluster.assumed,
    )


def largest_micro_batches(model: Model, plan: RunPlan, cluster: Cluster) -> dict[str, dict[str, int]]:
    """ZeRO stage -> kind -> images that fit, were the batch no bound."""
    return {
        str(stage): {kind: memory_of(model, plan, cluster, stage, kind).largest_micro_batch for kind in KINDS}
        for stage in STAGES
    }


def advice(recipe: Recipe, plan: RunPlan, memory: Memory, largest: dict[str, dict[str, int]]) -> list[str]:
    """What to change where it does not fit, or what fits as well and computes less."""
    mine, kind = largest[str(recipe.zero_stage)], counted_as(recipe.activation_checkpointing)
    if memory.fits:
        if kind != "none" and mine["none"] >= plan.micro_batch:
            return ["activation_checkpointing=none fits too, and nothing is computed twice"]
        return []
    found = []
    if mine[kind] >= 1:
        found.append(f"micro_batch={mine[kind]} fits; the rest of the batch is accumulated")
    stages = [
        stage for stage in range(4) if stage > recipe.zero_stage and largest[str(stage)][kind] >= plan.micro_batch
    ]
    kinds = [other for other in KINDS if mine[other] >= plan.micro_batch]
    found += [f"activation_checkpointing={other} fits" for other in kinds[:1]]
    found += [f"zero_stage={stage} fits" for stage in stages[:1]]
    return found or ["nothing fits: use a GPU with more memory, or a ds_config that offloads (ds_configs/)"]


def _collectives(model: Model, plan: RunPlan, cluster: Cluster) -> list[Any]:
    strategy = strategy_of(model.recipe, plan)
    return collectives(model.shapes, strategy, plan.world_size, plan.accumulation)


def step_of(model: Model, plan: RunPlan, cluster: Cluster) -> StepTime:
    """Time of the recipe's optimizer step."""
    recipe, strategy = model.recipe, strategy_of(model.recipe, plan)
    states = state_bytes(model.shapes, strategy, plan.world_size)
    return step_time(
        activations=model.activations[counted_as(recipe.activation_checkpointing)],
        plan=plan,
        found=_collectives(model, plan, cluster),
        offloaded=(states.disk or states.host) if strategy.offload_optimizer else 0,
        on_disk=states.disk,
        nodes=cluster.nodes,
        gpu=cluster.gpu,
        peak=peak_flops(cluster.gpu, recipe.precision),
        assumed=cluster.assumed,
    )


def scaling(model: Model, cluster: Cluster) -> list[dict[str, Any]]:
    """On 1, 2, 4, ... nodes up to the cluster's, with the same global batch; ``efficiency`` is a GPU's images/s in
    terms of the first row's."""
    counts = sorted({cluster.nodes, *(2**n for n in range(20) if 2**n < cluster.nodes)})
    rows: list[dict[str, Any]] = []
    for nodes in counts:
        part = replace(cluster, nodes=nodes)
        try:
            plan = model.recipe.plan(part.world_size, model.recipe.expected_samples)
        except RecipeError as error:
            rows.append({"nodes": nodes, "error": str(error)})
            continue
        step = step_of(model, plan, part)
        rows.append({"nodes": nodes, "micro_batch": plan.micro_batch, "accumulation": plan.accumulation,
                     "images_per_second": step.images_per_second})  # fmt: skip
    base = next(row for row in rows if "error" not in row)
    for row in (row for row in rows if "error" not in row):
        row["efficiency"] = row["images_per_second"] / row["nodes"] / (base["images_per_second"] / base["nodes"])
    return rows


def _data(recipe: Recipe, plan: RunPlan, step: StepTime, cluster: Cluster) -> dict[str, Any]:
    """Images/s that a rank's data workers must give, and can."""
    needed, workers = step.images_per_second / plan.world_size, max(1, recipe.data.workers)
    available = workers * cluster.assumed.loader_images
    return {"needed_per_rank": needed, "workers": workers, "available_per_rank": available,
            "enough": needed <= available}  # fmt: skip


def checkpointing_of(model: Model, plan: RunPlan, cluster: Cluster, asynchronous: bool) -> Checkpointing:
    """Costs of a checkpoint: copied to the host by every rank, then written by all of them together.

    Raises UserError where failures leave less than 1% of the time to train in: it could not be simulated.
    """
    size, assumed = model.shapes.trainable * STATE_BYTES, cluster.assumed
    copied = size / plan.world_size / (assumed.pcie_gbytes * 1e9)
    written = size / (assumed.storage_gbytes * 1e9)
    costs = Checkpointing(
        blocked=assumed.save_seconds + copied + (0.0 if asynchronous else written),
        delay=written if asynchronous else 0.0,
        restart=assumed.restart_seconds + written,  # read again at the rate of writing
        mtbf=assumed.mtbf_hours * 3600 / cluster.nodes,
    )
    again = costs.blocked + costs.delay + costs.restart
    if again > 5 * costs.mtbf:
        raise UserError(
            f"--mtbf-hours {assumed.mtbf_hours:g}: {cluster.nodes} nodes fail every {costs.mtbf:.3g} s, a checkpoint "
            f"and a restart take {again:.3g} s: nothing would be trained; choose a larger number, or fewer nodes"
        )
    return costs


def _checkpoints(model: Model, plan: RunPlan, step: StepTime, cluster: Cluster, asynchronous: bool) -> dict[str, Any]:
    costs = checkpointing_of(model, plan, cluster, asynchronous)
    simulated, share = simulated_optimum(costs)
    every = recommended_every(costs, step)
    return {
        **asdict(costs),
        "asynchronous": asynchronous,
        "bytes": model.shapes.trainable * STATE_BYTES,
        "young_seconds": costs.young,
        "daly_seconds": costs.daly,
        "simulated_seconds": simulated,
        "simulated_overhead": share,
        "checkpoint_every": every,
        "overhead": costs.overhead(every * step.total),
        "recipe_overhead": costs.overhead(model.recipe.checkpoint_every * step.total),
    }


def recommended_every(costs: Checkpointing, step: StepTime) -> int:
    """Optimizer steps between checkpoints: Daly's optimum, and no sooner than the last one is written."""
    return max(1, round(max(costs.daly, costs.delay) / step.total))


def run(model: Model, plan: RunPlan, step: StepTime, cluster: Cluster, asynchronous: bool) -> dict[str, float]:
    """The whole run: days with failures and checkpoints at the recommended interval, GPU hours, price."""
    costs = checkpointing_of(model, plan, cluster, asynchronous)
    if step.total > 5 * costs.mtbf:
        raise UserError(
            f"a step of the global batch takes {step.total:.3g} s, {cluster.nodes} nodes fail every "
            f"{costs.mtbf:.3g} s: nothing would be trained; look at --mtbf-hours, --efficiency and the bandwidths"
        )
    lost = costs.overhead(recommended_every(costs, step) * step.total)
    seconds = plan.stop_step * step.total / (1 - lost)
    hours = seconds / 3600 * plan.world_size
    return {
        "images": plan.stop_step * plan.global_batch,
        "days": seconds / 86400,
        "expected_failures": seconds / costs.mtbf,
        "gpu_hours": hours,
        "price": hours * cluster.assumed.price_per_gpu_hour,
    }
