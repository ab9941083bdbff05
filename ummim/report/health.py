"""Two looks into an encoder: the effective rank of every block's features, and how far its heads look.

Effective rank: RankMe (Garrido et al., ICML 2023): exp of the entropy of the singular values, scaled to sum to 1; low
where the features have collapsed. Attention distance: "An Image is Worth 16x16 Words" (Dosovitskiy et al., ICLR 2021),
figure 7: the distance in the image from a query patch to the others, weighted by its attention.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ummim.backbones.relative_vit import RelativeViT
from ummim.backbones.vit import ViT
from ummim.data import Augment, Batch, ShardIndex, decode, fixed_batch
from ummim.data.normalise import normalise
from ummim.errors import UserError
from ummim.interop.run import load_run
from ummim.masking import MaskPlan
from ummim.methods.api import Method
from ummim.recipe import Recipe
from ummim.report.read import Checkpoint

IMAGES = 16
CHECKPOINTS = 6  # most that are looked into
_FLOOR = 1e-7  # RankMe's epsilon


@dataclass(frozen=True)
class Health:
    """What a checkpoint's encoder makes of some images.

    Attributes:
        step: optimizer steps of the checkpoint.
        ranks: effective rank of each block's token features, in order.
        widths: channels of each block: the most that its rank can be.
        distances: for each block the mean attention distance of each head, in pixels; empty where not defined.
    """

    step: int
    ranks: list[float]
    widths: list[int]
    distances: list[list[float]]


def looked_into(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints to look into, oldest first: the first, the newest, and evenly spaced ones."""
    sound = [each for each in checkpoints if each.wrong is None]
    if len(sound) <= CHECKPOINTS:
        return sound
    return [sound[round(i * (len(sound) - 1) / (CHECKPOINTS - 1))] for i in range(CHECKPOINTS)]


def look(checkpoint: Checkpoint, batch: Batch) -> Health:
    """Run a checkpoint's encoder on ``batch``. Raises CheckpointError or RecipeError where it cannot be loaded."""
    _, method, _ = load_run(checkpoint.path)
    ranks, widths, distances = probe(method, batch)
    return Health(checkpoint.step, ranks, widths, distances)


def fixed_images(recipe: Recipe, digest: str | None, shards: str | None = None) -> tuple[Batch, str]:
    """Images with masks of the recipe's kind, the same at every call, and where they are from.

    From the run's shards, spread over the classes, if they are on this machine and have the run's ``digest``; else from
    the package's photographs.
    """
    place = shards or recipe.data.shards
    if "://" in place:
        return _packaged(recipe), f"the packaged photographs ({place} is not fetched)"
    try:
        index = ShardIndex.open(place)
        if digest is not None and index.digest != digest:
            return _packaged(recipe), f"the packaged photographs ({place} is not what the run has read)"
        return fixed_batch(index, recipe.data, recipe.sampler(), recipe.seed, IMAGES), str(place)
    except (UserError, OSError):
        return _packaged(recipe), f"the packaged photographs (the run's shards are not at {place})"


def probe(method: Method, batch: Batch) -> tuple[list[float], list[int], list[list[float]]]:
    """Effective rank and width of every block's features, and the attention distances of its heads; see ``Health``.

    Images are whole, but for an encoder on the compact grid (UM-MAE), which sees them under the batch's plan as in
    training.
    """
    encoder, ranks, widths = method.encoder, list[float](), list[int]()
    plan: MaskPlan | None = batch.plan if getattr(encoder, "hiding", None) == "compact" else None
    first = 1 if isinstance(encoder, (ViT, RelativeViT)) else 0  # a class token
    heads: list[list[float]] = []
    hooks: list[Any] = []

    def on_block(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        tokens = output[:, first:].flatten(0, -2)  # (B * n, D)
        ranks.append(effective_rank(tokens))
        widths.append(tokens.shape[1])

    for block in _blocks(encoder):
        hooks.append(block.register_forward_hook(on_block))
        if isinstance(encoder, (ViT, RelativeViT)):
            hooks += _overhear(block.attn, encoder.grid, encoder.config.patch_size, heads)
    with ExitStack() as stack, torch.no_grad():
        for hook in hooks:
            stack.callback(hook.remove)
        encoder(normalise(batch.images), plan)
    return ranks, widths, heads


def effective_rank(features: Tensor) -> float:
    """RankMe of (n, D) features: between 1 and min(n, D); not a number where they are not finite, or all zero.

    By the eigenvalues of their D x D products, in float64.
    """
    features = features.double()
    products = features.T @ features
    if not torch.isfinite(products).all() or not products.any():
        return math.nan
    values = torch.linalg.eigvalsh(products).clamp_min(0).sqrt()
    shares = values / values.sum() + _FLOOR
    return float(torch.exp(-(shares * shares.log()).sum()))


def attention_distances(attention: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(..., N, N) attention of patches to patches, rows that sum to anything -> (...,) mean distance in pixels."""
    apart = patch_distances(grid, patch).to(attention)
    return ((attention * apart).sum(-1) / attention.sum(-1)).mean(-1)


def patch_distances(grid: tuple[int, int], patch: int) -> Tensor:
    """(N, N) distances in pixels between the centres of a grid's patches."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1).double() * patch  # (N, 2)
    return torch.cdist(places, places)


def _overhear(attention: Any, grid: tuple[int, int], patch: int, heads: list[list[float]]) -> Iterator[Any]:
    """Hooks on a ViT block's attention that append the distances of its heads."""
    bias: list[Tensor | None] = []

    def before(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        bias[:] = [inputs[1] if len(inputs) > 1 else None]

    def on_qkv(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        b, n, _ = output.shape
        queries, keys, _ = output.float().view(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        total = torch.zeros(attention.num_heads, dtype=torch.float64)
        for i in range(b):  # one image at a time: all would be gigabytes for a large grid
            logits = queries[i] @ keys[i].mT * queries.shape[-1] ** -0.5  # (heads, 1 + N, 1 + N)
            if bias[0] is not None:
                logits = logits + bias[0][i % len(bias[0])]
            total += attention_distances(logits.softmax(-1)[:, 1:, 1:].double(), grid, patch)
        heads.append((total / b).tolist())

    yield attention.register_forward_pre_hook(before)
    yield attention.qkv.register_forward_hook(on_qkv)


def _blocks(encoder: nn.Module) -> list[nn.Module]:
    """The Transformer blocks of any encoder, in order: what its lists called ``blocks`` hold."""
    lists = [module for name, module in encoder.named_modules() if name.rpartition(".")[2] == "blocks"]
    return [block for each in lists if isinstance(each, nn.ModuleList) for block in each]


def _packaged(recipe: Recipe) -> Batch:
    """Centre crops of the packaged photographs, from each folder in turn."""
    folder = Path(str(resources.files("ummim") / "sample_images"))
    files = sorted(folder.glob("*/*.jpg"), key=lambda path: (path.stem.rpartition("-")[2], path))[:IMAGES]
    augment, sampler = Augment(recipe.data), recipe.sampler()
    images = torch.stack([augment.centre(decode(file.read_bytes())) for file in files])
    plan = sampler.stack([sampler(sampler.seed(recipe.seed, 0, file.name, 0)) for file in files])
    return Batch(images, plan, torch.full((len(images),), -1), [file.name for file in files])
