"""What a micro-batch keeps in memory, by kind of activation checkpointing, counted on the ``meta`` device.

As in ``ummim.cost``, the code that trains runs on shapes alone, here with its backward pass, while every storage is
followed from its making to its end.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ummim.cost import (
    SwapAttention,
    batch_of,
    build_on_meta,
    count_flops,
    fused_attention,
    meta_inputs,
    plain_attention,
    saved_bytes,
)
from ummim.engine.zero import apply_activation_checkpointing
from ummim.methods.api import Method
from ummim.recipe import Recipe

KINDS = ("none", "torch", "fairscale", "fairscale_offload")  # DeepSpeed's works as fairscale's


@dataclass(frozen=True)
class Activations:
    """Of one image, under one kind of activation checkpointing.

    Attributes:
        saved: bytes held between the forward and the backward pass.
        working: bytes more at the worst moment, mostly of the backward pass: gradients of activations, and the block
            that is being recomputed. Gradients of weights do not count.
        host: bytes of block inputs that wait in host memory.
        forward_flops: of the forward pass.
        flops: of both passes, with what is computed twice. PyTorch's checkpointing stops as soon as it has what the
            backward pass needs; DeepSpeed's and fairscale's recompute blocks to their end.
        operators: launched for one micro-batch, forward and backward; not of an image.
    """

    saved: float
    working: float
    host: float
    forward_flops: float
    flops: float
    operators: int


def counted_as(kind: str) -> str:
    """Which of KINDS stands for a recipe's ``activation_checkpointing``."""
    return "fairscale" if kind == "deepspeed" else kind


def measure(recipe: Recipe, kind: str, attention: Callable[..., Tensor] = fused_attention) -> Activations:
    """Follow one micro-batch of ``recipe`` under ``kind``, one of KINDS, through its forward and backward pass."""
    inputs = meta_inputs(recipe)
    batch = batch_of(recipe)
    method, host = _prepared(recipe, kind, attention)
    saved = saved_bytes(method, *inputs, attention)
    waiting = sum(host)
    peak, operators = _peak(method, inputs, attention)
    method, _ = _prepared(recipe, kind, plain_attention)  # fused operators have no count of FLOPs
    forward, flops = count_flops(method, *inputs)
    return Activations(
        saved=saved / batch,
        working=max(0, peak - saved) / batch,
        host=waiting / batch,
        forward_flops=forward / batch,
        flops=flops / batch,
        operators=operators,
    )


def _prepared(recipe: Recipe, kind: str, attention: Callable[..., Tensor]) -> tuple[Method, list[int]]:
    """The method on the meta device under ``kind``, and where each offloaded input's bytes will be listed."""
    method = build_on_meta(recipe)
    host: list[int] = []
    for block in method.checkpointed():
        if kind != "none":  # a mode does not reach what the backward pass recomputes
            block.forward = _under(attention, block.forward)
        if kind.startswith("fairscale"):
            block.forward = _recomputed(block.forward, host if kind == "fairscale_offload" else None)
    if kind == "torch":
        apply_activation_checkpointing(method.checkpointed(), kind)
    return method, host


def _under(attention: Callable[..., Tensor], forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        with SwapAttention(attention):
            return forward(*inputs)

    return run


def _recomputed(forward: Callable[..., Any], host: list[int] | None) -> Callable[..., Any]:
    """What fairscale and DeepSpeed do with a block; with ``host``, its inputs leave the device between the passes.

    fairscale's own does not run where device and host are both ``meta``.
    """

    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, anchor: Tensor, *inputs: Any) -> Any:
            ctx.others = [None if torch.is_tensor(value) else value for value in inputs]
            ctx.wanted = [torch.is_tensor(value) and value.requires_grad for value in inputs]
            tensors = [value if torch.is_tensor(value) else None for value in inputs]
            if host is None:
                ctx.save_for_backward(*tensors)
                return forward(*inputs)
            host.extend(value.nbytes for value in tensors if value is not None)
            ctx.shapes = [None if value is None else (value.shape, value.dtype) for value in tensors]
            return forward(*inputs)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            if host is None:
                tensors = [None if value is None else value.detach() for value in ctx.saved_tensors]
            else:
                tensors = [s and torch.empty(s[0], dtype=s[1], device="meta") for s in ctx.shapes]
            leaves = [v if v is None else v.requires_grad_(want) for v, want in zip(tensors, ctx.wanted, strict=True)]
            with torch.enable_grad():
                outputs = forward(*(o if v is None else v for o, v in zip(ctx.others, leaves, strict=True)))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if torch.is_tensor(o) and o.requires_grad]
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
            return None, *(None if v is None else v.grad for v in leaves)

    def run(*inputs: Any) -> Any:
        return Recomputed.apply(torch.empty(0, device="meta", requires_grad=True), *inputs)

    return run


def _peak(method: Method, inputs: tuple[Tensor, Any], attention: Callable[..., Tensor]) -> tuple[int, int]:
    """Most bytes of activations and their gradients that live at once, and the operators launched."""
    images, plan = inputs
    given = [*method.parameters(), *method.buffers(), images, plan.visible, plan.secondary, plan.kept, plan.thrown]
    hooks = [p.register_post_accumulate_grad_hook(_drop) for p in method.parameters() if p.requires_grad]
    with SwapAttention(attention), Living(given) as living:
        loss = method(images, plan).loss
        torch.autograd.backward(loss)
    for hook in hooks:
        hook.remove()
    return living.peak, living.operators


def _drop(parameter: Tensor) -> None:
    parameter.grad = None  # counted with the states


class Living(TorchDispatchMode):
    """Count operators and the bytes of storages that live, but for those of ``given`` tensors."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in given}
        self.live: set[int] = set()
        self.now = self.peak = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = False
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                made = self._follow(value.untyped_storage()) or made
        self.operators += made or func._schema.is_mutable
        return result

    def _follow(self, storage: torch.UntypedStorage) -> bool:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.live:
            return False
        self.live.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end, key, size)
        return True

    def _end(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size


def largest_parameters(model: nn.Module) -> int:
    """Elements of the largest single module's own parameters: what ZeRO-3 must gather at the least."""
    return max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
