"""DeepSpeed behind one door: start, configuration, activation checkpointing, backward, step.

With ``zero_state`` the only file that imports deepspeed or fairscale, always inside a function: it takes seconds. No
operator is compiled but the one that optimizer state on NVMe needs: a first start needs neither a C++ compiler nor
ninja, and no lock is taken that a killed start could leave behind. Checked with deepspeed 0.19.8; what is mended here
by hand says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ummim.engine import nvme
from ummim.engine.average import Average
from ummim.engine.network import choose_interface
from ummim.engine.optim import build_optimizer
from ummim.errors import RecipeError, UserError

if TYPE_CHECKING:
    from ummim.run_config import RunConfig
    from ummim.run_plan import RunPlan

GROUP_TIMEOUT = timedelta(minutes=30)  # of a collective: the watchdog finds faults long before
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# DeepSpeed keys that the recipe owns, and the recipe's name for each.
OWNED = {
    "train_batch_size": "global_batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "global_batch and micro_batch",
    "optimizer": "optim",
    "scheduler": "optim",
    "gradient_clipping": "optim.clip_grad",
    "bf16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "communication_data_type": "reduce_precision",
}


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def setup_distributed() -> World:
    """Join the process group: gloo on CPU, nccl on CUDA; alone, when no launcher set the rendezvous.

    Works the same under ``python``, ``torchrun`` and ``deepspeed``. Raises UserError if only a part of the
    rendezvous variables is set, or if no network interface can be told.
    """
    missing = [name for name in RENDEZVOUS if not os.environ.get(name)]
    if "RANK" not in missing and missing:
        raise UserError(f"RANK is set but {', '.join(missing)} is not: start with torchrun or deepspeed, or unset RANK")
    if missing and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UserError("srun started several tasks without a rendezvous: have srun start torchrun, once per node")
    if missing:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(zip(RENDEZVOUS, ("0", "0", "1", "127.0.0.1", str(port)), strict=True))
    choose_interface()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else its first line is a warning that it found none
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)

    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import numa
    from torch.distributed import distributed_c10d

    # An empty table says that no operator can be built, and skips the probing of compilers as well.
    deepspeed.ops.__compatible_ops__ = {}
    numa.get_numa_cores = cache(numa.get_numa_cores)  # ZeRO-3 on a CPU would start numactl at every micro-batch
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(local_rank)
        device = torch.device(get_accelerator().device_name(local_rank))
    # ZeRO makes groups of its own, whose timeout is torch's default: for NCCL, that is less than a checkpoint may take
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = GROUP_TIMEOUT
    deepspeed.init_distributed(verbose=False, timeout=GROUP_TIMEOUT)
    return World(int(os.environ["RANK"]), local_rank, int(os.environ["WORLD_SIZE"]), device)


def shutdown() -> None:
    """Leave the process group, so that no process ends with a warning about it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        nvme.remove_folders()
        time.sleep(0.2)  # gloo's threads drop their last tensors: too late, it would abort (pytorch/pytorch#179291)


def config_folder() -> Path:
    """The folder of the packaged DeepSpeed JSON, which lies beside the package, installed or not."""
    return Path(__file__).resolve().parents[2] / "ds_configs"


def deepspeed_config(recipe: RunConfig, plan: RunPlan) -> dict[str, Any]:
    """DeepSpeed's configuration: the strategy from a JSON file, every number from the recipe.

    The file is ``recipe.ds_config``, else ``ds_configs/zero<stage>.json``. Raises RecipeError where the file is
    missing or not JSON, sets a key that belongs to the recipe, or offloads to where we cannot follow.
    """
    path = Path(recipe.ds_config) if recipe.ds_config else config_folder() / f"zero{recipe.zero_stage}.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise RecipeError(f"ds_config: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RecipeError(f"ds_config: {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"ds_config: {path} must hold a JSON object, not a {type(config).__name__}")
    for key in OWNED.keys() & config.keys():
        raise RecipeError(f"ds_config: {path} sets {key!r}: remove it there, the recipe's {OWNED[key]} sets it")
    zero = config.setdefault("zero_optimization", {})
    if zero.setdefault("stage", recipe.zero_stage) != recipe.zero_stage:
        raise RecipeError(f"ds_config: {path} sets stage {zero['stage']}, the recipe zero_stage={recipe.zero_stage}")
    nvme.check_offload(zero, path, recipe.output)
    config.setdefault("zero_force_ds_cpu_optimizer", False)  # offloaded, torch's AdamW goes on: nothing is compiled
    config.setdefault("steps_per_print", 10**9)  # the engine has its own log
    config["train_batch_size"] = plan.global_batch
    config["train_micro_batch_size_per_gpu"] = plan.micro_batch
    config["gradient_accumulation_steps"] = plan.accumulation
    config["gradient_clipping"] = recipe.optim.clip_grad
    if recipe.precision != "fp32":
        config[recipe.precision] = {"enabled": True}
    if recipe.precision == "bf16" and recipe.zero_stage > 0:  # DeepSpeed refuses the mix without ZeRO
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if recipe.reduce_precision is not None:
        config["communication_data_type"] = recipe.reduce_precision
    return config


def apply_activation_checkpointing(blocks: Iterable[nn.Module], kind: str) -> None:
    """Recompute each block's activations in the backward pass instead of keeping them.

    Parameter names stay as they are: only ``block.forward`` is replaced. ``kind``: none, torch (non-reentrant),
    deepspeed, fairscale, fairscale_offload (block inputs wait in host memory).
    """
    if kind in ("fairscale", "fairscale_offload"):
        from fairscale.nn.checkpoint import checkpoint_wrapper

        for block in blocks:
            checkpoint_wrapper(block, offload_to_cpu=kind == "fairscale_offload")
    elif kind in ("torch", "deepspeed"):
        for block in blocks:
            block.forward = partial(_recompute(kind), block.forward)
    elif kind != "none":
        raise RecipeError(
            f"activation_checkpointing={kind!r}: use none, torch, deepspeed, fairscale, fairscale_offload"
        )


def _recompute(kind: str) -> Callable[..., Any]:
    if kind == "torch":
        return partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    from deepspeed import checkpointing

    checkpointing.configure(None)

    def recompute(forward: Callable[..., Any], *inputs: Any) -> Any:
        # DeepSpeed's function would lose the gradients of a block whose inputs need none (the first one on top
        # of a frozen patch embedding), and without gradients there is nothing to save.
        if any(torch.is_tensor(value) and value.requires_grad for value in inputs):
            return checkpointing.checkpoint(forward, *inputs)
        return forward(*inputs)

    return recompute


def build_async_io() -> None:
    """Load DeepSpeed's operator for swap files; compiled at its first use, for minutes. Raises UserError."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    nvme.build(lambda: AsyncIOBuilder().load())


def initialize(task: nn.Module, recipe: RunConfig, plan: RunPlan, ema: float = 0.0) -> Any:
    """Wrap ``task`` into a DeepSpeed engine with the recipe's optimizer and activation checkpointing.

    ``engine.average``: the moving average of the weights, with the decay ``ema``; None without one.
    ``engine.frozen``: on rank 0, the float32 values of frozen parameters, which DeepSpeed casts with the others.
    ``engine.layout``: a digest of all names and shapes and of what is trained, by which a checkpoint knows its model.
    Raises UserError for a precision that the device cannot compute in.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    able = {"fp32": True, "bf16": device.is_bf16_supported(), "fp16": device.is_fp16_supported()}
    if not able[recipe.precision]:
        others = " or ".join(name for name in ("bf16", "fp32") if able[name])
        raise UserError(f"precision={recipe.precision}: this {device.device_name()} cannot; use {others}")
    apply_activation_checkpointing(task.blocks(), recipe.activation_checkpointing)  # type: ignore[operator]
    frozen = {name: p.detach().clone() for name, p in task.named_parameters() if not p.requires_grad}
    buffers = {name: b.detach().clone() for name, b in task.named_buffers()}
    shapes = repr([(name, tuple(value.shape), name in frozen) for name, value in task.state_dict().items()])
    shapes += "" if recipe.optim.optimizer == "adamw" else recipe.optim.optimizer  # its state is another
    optimizer = build_optimizer(task, recipe.optim)
    config = deepspeed_config(recipe, plan)
    world = World(torch.distributed.get_rank(), int(os.environ["LOCAL_RANK"]), plan.world_size, torch.device("cpu"))
    nvme.prepare(config, [group["params"] for group in optimizer.param_groups], world, build_async_io)
    with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints the memory in use, six times
        engine = deepspeed.initialize(model=task, optimizer=optimizer, config=config, dist_init_required=False)[0]
    for name, value in buffers.items():  # cast with the weights in some stages; fixed tables stay exact in all
        module, _, leaf = name.rpartition(".")
        engine.module.get_submodule(module)._buffers[leaf] = value.to(engine.device)
    optimizer.state.clear()  # without ZeRO, the 16-bit wrapper has run Adam's first step on zeros
    engine.frozen = frozen if torch.distributed.get_rank() == 0 else {}
    engine.average = Average(engine, ema) if ema else None
    engine.layout = hashlib.sha256(shapes.encode()).hexdigest()
    return engine


def backward(engine: Any, loss: Tensor) -> None:
    """Accumulate the gradients of one micro-batch; DeepSpeed divides by the accumulation."""
    if engine.fp16_enabled() and not engine.zero_optimization():
        loss = loss * engine.optimizer.loss_scale  # deepspeed 0.19.8 unscales in its step but never scales
    engine.backward(loss)


def step(engine: Any, drop: bool = False) -> float | None:
    """Take the optimizer step and return the global gradient norm before clipping, the same on every rank.

    None where no weight has changed: a gradient that is not finite, by a float16 overflow or otherwise, or ``drop``.
    """
    norm: Any = None
    if not engine.zero_optimization() and not engine.fp16_enabled() and not engine.bfloat16_enabled():
        norm = nn.utils.get_total_norm(p.grad for p in engine.module.parameters() if p.grad is not None)
        drop = drop or not math.isfinite(norm)  # DeepSpeed looks at 16-bit and ZeRO's gradients only
    scale = engine.optimizer.loss_scale if engine.fp16_enabled() and not engine.zero_optimization() else 1.0
    with _dropping(engine) if drop else contextlib.nullcontext():
        engine.step()
    if drop or not engine.was_step_applied():
        return None
    if engine.average is not None:
        engine.average.update(engine.global_steps)
    return float(engine.get_global_grad_norm() if norm is None else norm) / scale


@contextlib.contextmanager
def _dropping(engine: Any) -> Iterator[None]:
    """DeepSpeed takes its step, and clears its gradients, but the AdamW inside it does nothing."""
    wrapped, inner = engine.optimizer, engine.basic_optimizer
    linked = getattr(wrapped, "_hp_optimizer_states_linked", None)
    inner.step = lambda closure=None: None
    try:
        yield
    finally:
        del inner.step
        if linked is False:  # there were no moments yet that it could have linked
            wrapped._hp_optimizer_states_linked = False
