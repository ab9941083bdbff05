"""A tiny all-reduce between hosts, and how long it took: gloo on CPUs, nccl on GPUs."""

import os
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ummim.engine.network import choose_interface
from ummim.errors import UserError

SECONDS = 60  # for all ranks to meet, and for each all-reduce
SMALL, LARGE = 1, 2**22  # float32 values: 4 bytes for the latency, 16 MiB for the bandwidth


@dataclass(frozen=True)
class Reduction:
    """What one rank measured.

    Attributes:
        backend: gloo or nccl.
        interface: network interface that gloo used.
        latency: seconds of an all-reduce of 4 bytes, the median.
        bandwidth: bytes per second over each link, 2 (n - 1) / n x size / time as NCCL's tests count it, at 16 MiB.
    """

    backend: str
    interface: str
    latency: float
    bandwidth: float


def all_reduce(master: str, port: int, rank: int, size: int) -> Reduction:
    """Meet the other ranks at ``master:port`` and reduce over all; one rank per host, on its first GPU.

    Raises:
        UserError: they do not meet, or the sum is wrong.
    """
    os.environ.update(MASTER_ADDR=master, MASTER_PORT=str(port), WORLD_SIZE=str(size), CROSS_SIZE=str(size))
    choose_interface()  # as training does
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=f"tcp://{master}:{port}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=SECONDS),
        )
        small, large = torch.ones(SMALL, device=device), torch.ones(LARGE, device=device)
        latency, took = _time(small, 20), _time(large, 3)
        total = torch.tensor([float(rank)], device=device)
        dist.all_reduce(total)
    except (RuntimeError, ValueError) as error:  # torch's errors of stores and backends
        raise UserError(f"rank {rank} of {size} at {master}:{port}: {' '.join(str(error).split())[:300]}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if total.item() != size * (size - 1) / 2:
        raise UserError(f"rank {rank} of {size} got {total.item()} as the sum of all ranks: the network alters data")
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    return Reduction("nccl" if cuda else "gloo", interface, latency, 2 * (size - 1) / size * 4 * LARGE / took)


def _time(values: torch.Tensor, times: int) -> float:
    """Seconds of an all-reduce of ``values``: the median of ``times``, after one that is not counted."""
    taken = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        dist.all_reduce(values)
        if values.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
        values.fill_(1.0)
    return sorted(taken[1:])[times // 2]
