"""The training state inside a DeepSpeed engine, parameter by parameter, whatever the ZeRO stage.

Float32 master weights and the optimizer's moments lie in tensors of DeepSpeed's own making: flat partitions under
ZeRO, one tensor a parameter without. ``Fragment`` says where in them a parameter's elements are; saving and restoring
need no more. Checked with deepspeed 0.19.8, stages 0 to 3 in fp32, bf16 and fp16, and offload to the CPU and to a disk
(``nvme``), where these tensors are empty outside of ``in_memory``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ummim.engine.checkpoint_shards import AVERAGE, BUFFER, FROZEN, MASTER, MOMENTS
from ummim.engine.nvme import on_disk

if TYPE_CHECKING:
    from ummim.engine.checkpoint_shards import Contents

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Fragment(NamedTuple):
    """Elements ``start`` to ``start + numel`` of a flattened parameter: those of ``flat`` from ``offset`` on."""

    name: str
    start: int
    numel: int
    flat: Tensor
    """The optimizer's own tensor, float32: the key of its state."""
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """This fragment of ``flat``, or of a moment of the same shape: (numel,), sharing memory."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def tensors_to_save(engine: Any) -> dict[str, Tensor]:
    """What this rank writes into its file, by the keys of ``checkpoint_shards``; live memory or files, not copies."""
    found = {}
    for fragment in _owned(engine):
        tensors = state_of(engine, fragment.flat)
        if engine.average is not None:
            tensors[AVERAGE] = engine.average.of(fragment.flat)
        for kind, tensor in tensors.items():
            found[f"{kind}/{fragment.name}@{fragment.start}"] = fragment.of(tensor)
    if torch.distributed.get_rank() == 0:
        found.update({f"{FROZEN}/{name}": value for name, value in engine.frozen.items()})
        found.update({f"{BUFFER}/{name}": value.detach() for name, value in _buffers(engine.module).items()})
    return found


def state_of(engine: Any, flat: Tensor) -> dict[str, Tensor]:
    """Master weights and moments in or beside ``flat``, the optimizer's own tensor, to be read: wherever they are."""
    moments, swapper = engine.basic_optimizer.state.get(flat, {}), getattr(engine.optimizer, "optimizer_swapper", None)
    tensors = {MASTER: flat, **{kind: moments[kind] for kind in MOMENTS if kind in moments}}
    return tensors if swapper is None else on_disk(swapper, flat, tensors)


@contextmanager
def in_memory(engine: Any, flat: Tensor) -> Iterator[None]:
    """Within it, ``flat`` and its moments can be written to."""
    wrapped = engine.optimizer
    group = next((i for i, other in enumerate(_swapped(wrapped)) if other is flat), None)
    if group is None or not wrapped._swappable_optimizer_subgroup(group):  # the small ones stay in memory
        yield
        return
    wrapped._optimizer_states_and_gradient_swap_in(group)
    yield
    wrapped._optimizer_states_and_gradient_swap_out(group)


def _swapped(wrapped: Any) -> list[Tensor]:
    """The optimizer's tensors at stage 3, where they may lie on a disk; else []."""
    return wrapped.fp32_partitioned_groups_flat if getattr(wrapped, "swap_optimizer", False) else []


def tables(engine: Any) -> dict[str, Any]:
    """``shapes`` and ``aliases``, for rank 0's file."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            aliases[name] = first[id(parameter)]
    shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in _trained(engine.module)}
    return {"shapes": shapes, "aliases": aliases}


def scalars(engine: Any) -> dict[str, Any]:
    """What else the next step depends on: AdamW's step count (DeepSpeed gives every parameter a gradient in every
    step, so there is one), the steps skipped, and float16's loss scaler."""
    steps = max((int(state.get("step", 0)) for state in engine.basic_optimizer.state.values()), default=0)
    scaler = _loss_scaler(engine)
    fields = {name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)} if scaler else None
    return {"adam_steps": steps, "skipped_steps": engine.skipped_steps, "loss_scaler": fields}


@torch.no_grad()
def restore(engine: Any, contents: Contents, saved: dict[str, Any], step: int) -> None:
    """Put what ``contents`` holds into ``engine``, fresh or in use. Every rank must call it.

    saved: the ``scalars`` of the engine that was saved, which may have had another world size, stage and precision.
    """
    inner = engine.basic_optimizer
    kinds = [kind for kind in MOMENTS if kind in contents.kinds]
    average = AVERAGE if AVERAGE in contents.kinds else MASTER  # one that was switched on later begins here
    by_flat: dict[int, list[Fragment]] = defaultdict(list)
    for fragment in held(engine):
        by_flat[id(fragment.flat)].append(fragment)
    for fragments in by_flat.values():
        flat = fragments[0].flat
        with in_memory(engine, flat):
            moments = inner.state.get(flat) or (_first_moments(inner, flat, kinds) if kinds else {})
            for fragment in fragments:
                name, start, numel = fragment[:3]
                fragment.of(flat).copy_(contents.read(MASTER, name, start, numel))
                if engine.average is not None:
                    fragment.of(engine.average.of(flat)).copy_(contents.read(average, name, start, numel))
                for kind in kinds:
                    fragment.of(moments[kind]).copy_(contents.read(kind, name, start, numel))
            if "step" in moments:
                moments["step"].fill_(saved["adam_steps"])
            for kind in moments.keys() & set(MOMENTS) if not kinds else ():
                moments[kind].zero_()
    for name, buffer in _buffers(engine.module).items():
        buffer.copy_(contents.whole(f"{BUFFER}/{name}"))
    _restore_frozen(engine, contents)
    cast_masters(engine)
    scaler = _loss_scaler(engine)
    for name, value in ((saved["loss_scaler"] or {}) if scaler else {}).items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
    engine.global_steps, engine.skipped_steps = step, saved["skipped_steps"]
    engine.global_samples = step * engine.train_batch_size()
    engine.micro_steps = step * engine.gradient_accumulation_steps()


def full_state_dict(engine: Any) -> dict[str, Tensor]:
    """All weights in float32 and all saved buffers, on the CPU of rank 0; {} on the others.

    Every rank must call it. The values are the optimizer's float32 master weights, whatever the ZeRO stage; keys
    are those of ``task.state_dict()``. Nothing shares memory.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    main = torch.distributed.get_rank() == 0
    masters = _masters_without_zero(engine)
    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if name in engine.frozen or not parameter.requires_grad:
            value = engine.frozen.get(name)
        elif _swapped(engine.optimizer):
            value = _gathered(engine, parameter)
        elif engine.zero_optimization():
            value = safe_get_full_fp32_param(parameter)
        else:
            value = masters.get(id(parameter), parameter)
        if main and value is not None:
            state[name] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    if main:
        buffers = _buffers(engine.module).items()
        state.update({name: b.detach().to("cpu", copy=True).contiguous() for name, b in buffers})
    return state


def _gathered(engine: Any, parameter: Any) -> Tensor:
    """A trained parameter's master weights; DeepSpeed's way to them reads a whole sub-group for each parameter."""
    group, offset, numel = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
    master = state_of(engine, _swapped(engine.optimizer)[group])[MASTER]
    whole: Tensor = engine.optimizer._fp32_state_allgather(parameter, master.detach().narrow(0, offset, numel))
    return whole


def _trained(module: nn.Module) -> Iterator[tuple[str, Any]]:  # parameters, with DeepSpeed's attributes
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that ``state_dict()`` holds."""
    names = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if name in names}


def held(engine: Any) -> Iterator[Fragment]:
    """All elements whose master weights are on this rank: without ZeRO, all of them on each."""
    wrapped, stage = engine.optimizer, engine.zero_optimization_stage()
    masters = _masters_without_zero(engine)
    for name, parameter in _trained(engine.module):
        if stage == 3:
            group, offset, length = wrapped.grad_position[wrapped.get_param_id(parameter)]
            start = wrapped._get_param_partition_rank(parameter) * length
            numel = min(length, parameter.ds_numel - start)  # the last ranks' shares are padded
            flat = wrapped.fp32_partitioned_groups_flat[group]
        elif stage > 0:
            mapping = parameter._hp_mapping
            if mapping is None:  # another rank's
                continue
            flat = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"][0]
            start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            offset = mapping.hp_fragment_address.start
        else:
            flat, start, offset = masters.get(id(parameter), parameter), 0, 0
            numel = flat.numel()
        if numel > 0:
            yield Fragment(name, start, numel, flat, offset)


def _owned(engine: Any) -> Iterator[Fragment]:
    """This rank's share of the elements: without ZeRO, an equal part of their concatenation."""
    if engine.zero_optimization():
        yield from held(engine)
        return
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    total = sum(p.numel() for _, p in _trained(engine.module))
    begin, end, reached = total * rank // size, total * (rank + 1) // size, 0
    for fragment in held(engine):
        low, high = max(begin - reached, 0), min(end - reached, fragment.numel)
        if low < high:
            yield fragment._replace(start=low, offset=low, numel=high - low)
        reached += fragment.numel


def _masters_without_zero(engine: Any) -> dict[int, Tensor]:
    """By the ids of 16-bit parameters: the wrapper without ZeRO keeps their master weights in a list of its own."""
    low, high = getattr(engine.optimizer, "fp16_groups", []), getattr(engine.optimizer, "fp32_groups", [])
    if engine.zero_optimization():
        return {}
    return {id(p): master for ps, masters in zip(low, high, strict=True) for p, master in zip(ps, masters, strict=True)}


def _first_moments(inner: torch.optim.Optimizer, flat: Tensor, kinds: list[str]) -> dict[str, Tensor]:
    """The optimizer's state for ``flat`` as its first step makes it."""
    on_device = inner.defaults.get("fused") or inner.defaults.get("capturable")
    state = inner.state[flat]
    if isinstance(inner, torch.optim.AdamW):
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if on_device else "cpu")
    state.update({kind: torch.zeros_like(flat, requires_grad=False) for kind in kinds})
    return state


def _restore_frozen(engine: Any, contents: Contents) -> None:
    from deepspeed.runtime.zero import GatheredParameters

    frozen = [(name, p) for name, p in engine.module.named_parameters() if not p.requires_grad]
    if not frozen:
        return
    gathered = [p for _, p in frozen if hasattr(p, "ds_id")]  # ZeRO-3 has cut them up as well
    with GatheredParameters(gathered, modifier_rank=0, enabled=bool(gathered)):
        for name, parameter in frozen:
            value = contents.whole(f"{FROZEN}/{name}")
            parameter.data.copy_(value)
            if name in engine.frozen:
                engine.frozen[name].copy_(value)


def cast_masters(engine: Any) -> None:
    """Make the weights that the model computes with from the master weights, as DeepSpeed's step does."""
    wrapped, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        wrapped.checkpoint_event_prologue()
        if _swapped(wrapped):
            wrapped.reset_swap_buffers()
        flats = zip(wrapped.fp16_partitioned_groups_flat, wrapped.fp32_partitioned_groups_flat, strict=True)
        for group, (low, high) in enumerate(flats if not _swapped(wrapped) else ()):
            low.data.copy_(high.data)
            wrapped._unflatten_partitioned_parameters(group)
        if wrapped.persistent_parameters:  # small ones stay whole on every rank: cut, to be gathered from the new parts
            wrapped.persistent_parameters[0].partition(wrapped.persistent_parameters)
        wrapped.checkpoint_event_epilogue()
    elif stage > 0:
        wrapped.update_lp_params()
    else:
        for low, high in zip(getattr(wrapped, "fp16_groups", []), getattr(wrapped, "fp32_groups", []), strict=True):
            torch._foreach_copy_([p.data for p in low], [p.data for p in high])


def _loss_scaler(engine: Any) -> Any:
    """DeepSpeed's dynamic loss scaler, or None."""
    if not engine.fp16_enabled():
        return None
    scaler = getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config
    return scaler if getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False) else None
