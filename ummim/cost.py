"""What a recipe costs for each image: FLOPs and the activations kept for the backward pass, beside the same
recipe under full reconstruction.

The method runs on the ``meta`` device, where tensors have shapes but no memory and nothing is computed, on one
micro-batch of the recipe and in its precision. So these are counts of what the code does, not estimates, and
ViT-L takes seconds. docs/cost.md says what is counted.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ummim.engine.zero import apply_activation_checkpointing
from ummim.masking import AttentionSampler, MaskPlan, sample_seed
from ummim.methods.api import Method
from ummim.recipe import Recipe

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Cost:
    """Costs of one image; the field names are the keys of ``ummim cost --json``.

    Attributes:
        parameters: all weights; fixed tables and TEC's frozen teacher are buffers and not counted.
        trainable_parameters: those with a gradient.
        forward_flops: of one forward pass with the loss. A multiply-add counts as 2; matrix products and
            convolutions are counted, element-wise work is not.
        training_flops: forward and backward pass, without what activation checkpointing or fused attention
            compute a second time, and without the optimizer.
        activation_bytes: kept for the backward pass as the recipe trains on a GPU: fused attention, and with
            the recipe's activation checkpointing only what lies outside the blocks and each block's input.
        activation_bytes_fused: without activation checkpointing, with fused attention.
        activation_bytes_materialised: without activation checkpointing, with attention weights kept in memory.
        frozen_parameters: weights that run but are never trained, a teacher's, on top of ``parameters``.
        frozen_bytes: memory that they take on every GPU, whole whatever the ZeRO stage.
        frozen_flops: their part of ``forward_flops`` and, having no backward pass, of ``training_flops``.
    """

    parameters: int
    trainable_parameters: int
    forward_flops: int
    training_flops: int
    activation_bytes: int
    activation_bytes_fused: int
    activation_bytes_materialised: int
    frozen_parameters: int
    frozen_bytes: int
    frozen_flops: int


def full_reconstruction(recipe: Recipe) -> Recipe:
    """The baseline: no token thrown, hence no aggregation; all else stays."""
    return replace(recipe, throw_ratio=0.0)


def cost(recipe: Recipe, attention: bool = True) -> Cost:
    """Count what ``recipe`` costs for each image of a micro-batch; ``attention`` as in :func:`meta_inputs`."""
    method = build_on_meta(recipe)
    inputs = meta_inputs(recipe, attention)
    forward, training = count_flops(method, *inputs)
    teacher = frozen_flops(method, *inputs)
    fused = saved_bytes(method, *inputs, fused_attention)
    materialised = saved_bytes(method, *inputs, plain_attention)
    kept = fused
    if recipe.activation_checkpointing != "none":
        apply_activation_checkpointing(method.checkpointed(), "torch")  # every kind keeps each block's input
        kept = saved_bytes(method, *inputs, fused_attention)
    frozen = method.frozen()
    weights = [] if frozen is None else list(frozen.buffers())
    batch = batch_of(recipe)
    return Cost(
        parameters=sum(p.numel() for p in method.parameters()),
        trainable_parameters=sum(p.numel() for p in method.parameters() if p.requires_grad),
        forward_flops=round(forward / batch),
        training_flops=round(training / batch),
        activation_bytes=round(kept / batch),
        activation_bytes_fused=round(fused / batch),
        activation_bytes_materialised=round(materialised / batch),
        frozen_parameters=sum(weight.numel() for weight in weights),
        frozen_bytes=sum(weight.nbytes for weight in weights),
        frozen_flops=round(teacher / batch),
    )


def report(recipe: Recipe) -> dict[str, Any]:
    """What ``ummim cost --json`` prints: the recipe's cost, its baseline's, and their ratios."""
    mine = cost(recipe)
    throws = recipe.throw_ratio > 0 or recipe.method.attention is not None
    full = cost(full_reconstruction(recipe), attention=False) if throws else mine
    return {
        "recipe": recipe.name,
        "throw_ratio": recipe.throw_ratio,
        "image_size": recipe.data.image_size,
        "batch": batch_of(recipe),
        "precision": recipe.precision,
        "activation_checkpointing": recipe.activation_checkpointing,
        **asdict(mine),
        "baseline": asdict(full),
        "flops_ratio": mine.forward_flops / full.forward_flops,
        "training_flops_ratio": mine.training_flops / full.training_flops,
        "activation_bytes_ratio": mine.activation_bytes / full.activation_bytes,
    }


def table(values: dict[str, Any]) -> str:
    """A report as text."""
    full, mib = values["baseline"], 2**20
    rows = [
        ("parameters, M", "parameters", 1e6),
        ("of them trained, M", "trainable_parameters", 1e6),
        ("forward, G multiply-adds", "forward_flops", 2e9),
        ("forward, GFLOPs", "forward_flops", 1e9),
        ("training, GFLOPs", "training_flops", 1e9),
        ("saved activations, MiB", "activation_bytes", mib),
        ("  nothing recomputed, fused attention, MiB", "activation_bytes_fused", mib),
        ("  nothing recomputed, materialised attention, MiB", "activation_bytes_materialised", mib),
    ]
    if values["frozen_parameters"]:
        rows += [
            ("frozen teacher's parameters, M", "frozen_parameters", 1e6),
            ("  its weights on every GPU, MiB", "frozen_bytes", mib),
            ("  its part of the forward pass, GFLOPs", "frozen_flops", 1e9),
        ]
    width = max(len(label) for label, _, _ in rows)
    lines = [
        f"{values['recipe']}: per image of {values['image_size']} pixels, {values['precision']}, batches of "
        f"{values['batch']}, throw_ratio={values['throw_ratio']}, "
        f"activation_checkpointing={values['activation_checkpointing']}",
        f"{'':<{width}}  {'recipe':>10}  {'full':>10}  {'ratio':>6}",
    ]
    for label, key, unit in rows:
        ratio = values[key] / full[key]
        lines.append(f"{label:<{width}}  {values[key] / unit:>10.3f}  {full[key] / unit:>10.3f}  {ratio:>6.3f}")
    return "\n".join([*lines, "full: full reconstruction, throw_ratio=0 without aggregation"])


def build_on_meta(recipe: Recipe) -> Method:
    """The method without memory; weights in the recipe's precision and buffers as they are, as the engine does."""
    with torch.device("meta"):
        method = recipe.method.build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)
    method.to("meta")
    for parameter in method.parameters():
        parameter.data = parameter.data.to(DTYPES[recipe.precision])
    return method


def batch_of(recipe: Recipe) -> int:
    """Images of one forward pass: the micro-batch, which lies within one mask's images where masks are shared."""
    shared = recipe.mask.shared_by if recipe.mask.shared_by > 1 else recipe.global_batch
    return min(recipe.micro_batch, shared)


def meta_inputs(recipe: Recipe, attention: bool = True) -> tuple[Tensor, MaskPlan]:
    """(B, 3, S, S) float32 images and a plan, on the meta device.

    All samples have the same plan: only counts matter, and methods that share a mask within a batch find it shared.
    Of a method whose masks follow attention (AMT) it is the plan of the epochs that have attention maps, or with
    ``attention=False`` of those before.
    """
    sampler, seed = recipe.sampler(), sample_seed(recipe.seed, 0, "cost")
    if attention and recipe.method.attention is not None:
        by_attention = AttentionSampler(sampler.grid, recipe.method.attention)
        sample = by_attention(seed, np.ones(sampler.grid))
    else:
        sample = sampler(seed)
    size = recipe.data.image_size
    plan = sampler.stack([sample] * batch_of(recipe))
    return torch.empty(plan.batch_size, 3, size, size, device="meta"), plan.to("meta")


def count_flops(method: Method, images: Tensor, plan: MaskPlan) -> tuple[int, int]:
    """FLOPs of a batch's forward pass, and of its forward and backward pass together."""
    with SwapAttention(plain_attention), FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        loss = method(images, plan).loss
        forward = counter.get_total_flops()
        loss.backward()
    method.zero_grad()
    return forward, counter.get_total_flops()


def frozen_flops(method: Method, images: Tensor, plan: MaskPlan) -> int:
    """FLOPs of the part of a batch's forward pass that is never trained."""
    frozen = method.frozen()
    if frozen is None:
        return 0
    name = next(name for name, module in method.named_modules() if module is frozen)
    with torch.no_grad(), SwapAttention(plain_attention), FlopCounterMode(display=False) as counter:
        method(images, plan)
    return sum(counter.get_flop_counts()[f"{type(method).__name__}.{name}"].values())


def _convolution_backward_flops(
    grad: list[int], x: list[int], weight: list[int], bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, output_mask: list[bool], **_: Any,
) -> int:  # fmt: skip
    """Each gradient asked for, of input and weight, takes the forward pass's multiply-adds.

    torch's own formula counts the weight's gradient ``groups`` times over.
    """
    return conv_flop_count(x, weight, grad, transposed) * sum(output_mask[:2])


FLOP_FORMULAS: dict[Any, Any] = {torch.ops.aten.convolution_backward: _convolution_backward_flops}


def saved_bytes(method: Method, images: Tensor, plan: MaskPlan, attention: Callable[..., Tensor]) -> int:
    """Bytes that autograd holds between a batch's forward and backward pass; each storage counts once.

    Weights, buffers, the images and the plan's ids do not count: they are there anyway.
    """
    given = [*method.parameters(), *method.buffers(), images, plan.visible, plan.secondary, plan.kept, plan.thrown]
    known = {tensor.untyped_storage()._cdata for tensor in given}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    with SwapAttention(attention), saved_tensors_hooks(pack, lambda tensor: tensor):
        output = method(images, plan)
    total = sum(storage.nbytes() for storage in saved.values())
    del output
    return total


class SwapAttention(TorchFunctionMode):
    """Replace ``scaled_dot_product_attention``, which picks its kernel by the device: meta has only the plain one."""

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = self.attention if func is F.scaled_dot_product_attention else func
        return func(*args, **(kwargs or {}))


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """(..., n, d) -> (..., n, d), step by step: the attention weights exist in memory."""
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    return (logits if attn_mask is None else logits + attn_mask).softmax(dim=-1) @ v


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The same by the operator that a GPU would run: flash, or memory-efficient for a bias or float32.

    They keep q, k, v, the bias, the output and a float32 log-sum-exp per query.
    """
    aten = torch.ops.aten
    if attn_mask is None and q.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    if attn_mask is not None:
        keys = attn_mask.shape[-1]
        if any(stride % 8 for stride in attn_mask.stride()[:-1]):
            attn_mask = F.pad(attn_mask, (0, -keys % 8))[..., :keys]  # PyTorch aligns the rows for the kernel
        attn_mask = attn_mask.expand(*q.shape[:-1], keys)
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, scale=scale)[0]
