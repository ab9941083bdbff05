"""Public figures of GPUs, and every other number that a calculation assumes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ummim.errors import UserError

GB, TERA = 1e9, 1e12
LEAST = 1e-9  # of any number that is given by hand, but for 0
MOST = 1e15  # likewise


@dataclass(frozen=True)
class Gpu:
    """One GPU and the node it comes in; bandwidths are of one direction.

    Attributes:
        name: as on the command line.
        half_flops: dense peak of bf16 (V100: fp16) tensor cores, FLOP/s.
        single_flops: peak of float32 without tensor cores, FLOP/s.
        memory: bytes.
        link: bytes/s between GPUs of a node, each.
        network: bytes/s between nodes, each node.
    """

    name: str
    half_flops: float
    single_flops: float
    memory: float
    link: float
    network: float


# Datasheets quote links as the sum of both directions; here it is halved. The network is that of the vendor's own
# eight-GPU machine, a port for each GPU where it has them: 100 Gbit/s = 12.5 GB/s.
GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA V100 datasheet (SXM2, 32 GB), DGX-1 (V100): four 100 Gbit/s ports. No bf16.
        Gpu("V100", 125 * TERA, 15.7 * TERA, 32 * GB, 150 * GB, 50 * GB),
        # NVIDIA A100 datasheet (SXM4), DGX A100: eight 200 Gbit/s ports.
        Gpu("A100-40", 312 * TERA, 19.5 * TERA, 40 * GB, 300 * GB, 200 * GB),
        Gpu("A100-80", 312 * TERA, 19.5 * TERA, 80 * GB, 300 * GB, 200 * GB),
        # NVIDIA L40S datasheet: PCIe 4.0 x16; the network of an OVX server, two 200 Gbit/s ports.
        Gpu("L40S", 362 * TERA, 91.6 * TERA, 48 * GB, 32 * GB, 50 * GB),
        # NVIDIA H100 datasheet (SXM5), DGX H100: eight 400 Gbit/s ports.
        Gpu("H100", 989 * TERA, 67 * TERA, 80 * GB, 450 * GB, 400 * GB),
        # NVIDIA H200 datasheet (SXM5), DGX H200.
        Gpu("H200", 989 * TERA, 67 * TERA, 141 * GB, 450 * GB, 400 * GB),
        # NVIDIA HGX and DGX B200 datasheets, an eighth: 36 PFLOP/s of bf16 with sparsity, half of it dense; 1,440 GB.
        Gpu("B200", 2250 * TERA, 75 * TERA, 180 * GB, 900 * GB, 400 * GB),
        # AMD Instinct MI300X datasheet: seven Infinity Fabric links of 128 GB/s; eight 400 Gbit/s ports.
        Gpu("MI300X", 1307 * TERA, 163.4 * TERA, 192 * GB, 448 * GB, 400 * GB),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """What no one has measured here. Every field is an option of ``ummim capacity``, under its own name.

    Attributes:
        efficiency: share of the GPU's peak that a pass reaches, recomputation counted. MAE's own code took "~42h in 64
            V100 GPUs" for ViT-L's 800 epochs (its PRETRAIN.md): 10.5%, without fused attention, data loading included.
        launch_microseconds: least time of one operator; it bounds small micro-batches.
        link_efficiency: share of the links' and the network's bandwidth that a collective reaches.
        link_microseconds, network_microseconds: a message's latency within a node and between nodes.
        pcie_gbytes: GB/s between a GPU and its host, of an offload.
        disk_gbytes: GB/s of a node's local disk, which optimizer state on NVMe is read from and written to.
        context_gib: CUDA context, NCCL's buffers, cuBLAS's workspaces.
        fragmentation: share of activations that the allocator loses on top.
        loader_images: images/s of a data worker (docs/data.md: a core of the machine that was measured).
        step_noise: standard deviation of a rank's step time, relative to its mean.
        mtbf_hours: a node's mean time between failures. Llama 3 (arXiv:2407.21783, section 3.3.4): 419 unexpected
            interruptions in 54 days of 2,048 nodes, one in 6,335 hours of a node.
        save_seconds: that training stands still at each checkpoint however small it is.
        storage_gbytes: GB/s that all ranks together write to the shared file system.
        restart_seconds: from a failure to the first new step, without reading the checkpoint: noticing it (60),
            starting anew, warming up.
        price_per_gpu_hour: any currency; 0: no price is shown.
    """

    efficiency: float = 0.2
    launch_microseconds: float = 5.0
    link_efficiency: float = 0.8
    link_microseconds: float = 3.0
    network_microseconds: float = 10.0
    pcie_gbytes: float = 20.0
    disk_gbytes: float = 3.0
    context_gib: float = 2.0
    fragmentation: float = 0.05
    loader_images: float = 780.0
    step_noise: float = 0.02
    mtbf_hours: float = 6335.0
    save_seconds: float = 1.0
    storage_gbytes: float = 2.0
    restart_seconds: float = 240.0
    price_per_gpu_hour: float = 0.0

    def check(self) -> None:
        """Raise UserError for a number that cannot be."""
        shares = ("efficiency", "link_efficiency", "step_noise", "fragmentation")
        free = ("step_noise", "fragmentation", "price_per_gpu_hour", "context_gib", "restart_seconds")
        for field in fields(self):
            value, option = getattr(self, field.name), "--" + field.name.replace("_", "-")
            if field.name in shares and not 0 <= value <= 1:
                raise UserError(f"{option} {value:g}: is a share: choose a value from 0 to 1")
            check_number(option, value, zero=field.name in free)


def check_number(option: str, value: float, zero: bool = False) -> None:
    """Raise UserError unless ``value`` is above 0, or 0 where that may be, and not beyond what can be calculated with;
    infinity is, and what is no number."""
    if value < 0 or (value == 0 and not zero):
        raise UserError(f"{option} {value:g}: choose a positive number")
    if 0 < value < LEAST:
        raise UserError(f"{option} {value:g}: choose a number of at least {LEAST:g}")
    if not value <= MOST:
        raise UserError(f"{option} {value:g}: choose a number of at most {MOST:g}")


def find_gpu(name: str | None, tflops: float | None, memory_gb: float | None, network_gbits: float | None) -> Gpu:
    """A GPU of the table, with what is given by hand put in its place.

    Raises UserError for a name that is not there, or where there is neither a name nor all that a GPU needs.
    """
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    if name is None and (tflops is None or memory_gb is None):
        raise UserError(f"--gpu: name one of {', '.join(GPUS)}, or give --gpu-tflops and --gpu-memory")
    if name is not None and name.lower() not in known:
        raise UserError(f"--gpu {name}: known are {', '.join(GPUS)}; give --gpu-tflops and --gpu-memory for another")
    for option, value in (
        ("--gpu-tflops", tflops), ("--gpu-memory", memory_gb), ("--network-gbits", network_gbits)
    ):  # fmt: skip
        if value is not None:
            check_number(option, value)
    gpu = known[name.lower()] if name is not None else Gpu("by hand", 0, 0, 0, 32 * GB, 50 * GB)
    if tflops is not None:
        gpu = replace(gpu, half_flops=tflops * TERA, single_flops=tflops * TERA)
    if memory_gb is not None:
        gpu = replace(gpu, memory=memory_gb * GB)
    return gpu if network_gbits is None else replace(gpu, network=network_gbits * GB / 8)


def peak_flops(gpu: Gpu, precision: str) -> float:
    """Of a precision. Raises UserError where the GPU does not have it."""
    if gpu.name == "V100" and precision == "bf16":
        raise UserError("precision=bf16: a V100 cannot; use fp16")
    return gpu.single_flops if precision == "fp32" else gpu.half_flops
