"""What an evaluation's passes compute, counted on the ``meta`` device as ``ummim.cost`` counts a pre-training's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ummim.capacity.activations import Living
from ummim.cost import DTYPES, FLOP_FORMULAS, SwapAttention, fused_attention, plain_attention
from ummim.downstream.recipe import ClassifyRecipe
from ummim.downstream.task import Classification, build_model, encoder_from_scratch

if TYPE_CHECKING:
    from torch import Tensor

    from ummim.capacity.report import Cluster

VALIDATION = 50_000  # images of ImageNet-1K's, which nearest neighbours see beside the training images


def measure(recipe: ClassifyRecipe) -> dict[str, Any]:
    """What a step's time depends on, see ``catalogue.on_cluster``: sizes of what is trained and what is not, and of one
    image ``forward_flops``, and ``flops`` of all passes, with the ``operators`` of a micro-batch.

    The backward pass goes as far down as something is trained: in full fine-tuning it makes that three forward passes
    (less what only the images' gradient would take), on a frozen encoder hardly more than one, of neighbours just one.
    A recipe with weights must have ``classify.encoder``, too.
    """
    task = build_on_meta(recipe)
    groups = task.parameter_groups(0.0)
    size, batch = recipe.data.image_size, recipe.micro_batch
    images = torch.empty(batch, 3, size, size, device="meta")
    with SwapAttention(plain_attention), FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        loss = loss_of(task, images)
        forward = counter.get_total_flops()
        if loss.requires_grad:
            loss.backward()
    task.zero_grad()
    with SwapAttention(fused_attention), Living([*task.parameters(), *task.buffers(), images]) as living:
        loss = loss_of(task, images)
        if loss.requires_grad:
            loss.backward()
    return {
        "groups": [sum(p.numel() for p in group["params"]) for group in groups],
        "frozen": sum(p.numel() for p in task.parameters() if not p.requires_grad),
        "buffers": sum(buffer.nbytes for buffer in task.buffers()),
        "activations": {
            "forward_flops": forward / batch,
            "flops": counter.get_total_flops() / batch,
            "operators": living.operators,
        },
    }


def build_on_meta(recipe: ClassifyRecipe) -> Classification:
    """The task without memory, in eval mode and in the recipe's precision; of neighbours nothing has a gradient."""
    with torch.device("meta"):
        task = Classification(build_model(recipe, encoder_from_scratch(recipe)), recipe.classify).to("meta")
    for parameter in task.parameters():
        parameter.data = parameter.data.to(DTYPES[recipe.precision])
    return task.requires_grad_(False).eval() if recipe.classify.protocol == "knn" else task.eval()


def loss_of(task: Classification, images: Tensor) -> Tensor:
    """() of (B, 3, S, S) images on the meta device, of any labels."""
    return F.cross_entropy(task.model(images).float(), torch.zeros(len(images), dtype=torch.int64, device="meta"))


def neighbours_on(recipe: ClassifyRecipe, passes: dict[str, Any], peak: float, cluster: Cluster) -> dict[str, float]:
    """Days and GPU hours of nearest neighbours: every training and validation image goes forward once.

    passes: ``measure``'s activations. Comparing features, a matrix product per image, is left out.
    """
    flops = passes["forward_flops"] * recipe.micro_batch / (peak * cluster.assumed.efficiency)
    batch = max(flops, passes["operators"] * cluster.assumed.launch_microseconds * 1e-6)
    hours = (recipe.expected_samples + VALIDATION) / recipe.micro_batch * batch / 3600
    return {"days": hours / cluster.world_size / 24, "gpu_hours": hours}
