"""Training steps under partial reconstruction, r = 0, 25, 50 and 65% of all tokens thrown: time, FLOPs and memory.

    python benchmarks/partial.py [--method RECIPE ...] [--batch N] [--output FILE.json]

Forward and backward pass of MAE ViT-B/16 and SimMIM ViT-B/16, or of any packaged recipe whose method knows partial
reconstruction (r below the recipe's mask ratio: SimMIM, which masks 60%, ends at 50%). The steps of all ratios are
interleaved, in an order that turns with every round, so that whatever else the machine does falls on all of them; what
counts are the ratios to the step at r = 0 of the same round. On a CPU the clock is the process's own, which stands
still while others run; OMP_NUM_THREADS=1 is best. Each step has other masks; the weights stay.

FLOPs and saved activations are those of ``ummim cost`` (bf16, no activation checkpointing; with fused attention, and
with attention weights in memory), counted on the meta device for the batch of the recipe. On a GPU the steps run
under bf16 autocast, with either kind of attention, and the allocator's peak is read as well; on a CPU in float32, as
the models run there (timm's blocks have PyTorch's fused attention, SimMIM's its weights in memory).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ummim.cost import SwapAttention, cost, plain_attention
from ummim.masking import MaskPlan
from ummim.methods.api import Method
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe

METHODS = ("mae_vit_base_800e", "simmim_vit_base_800e")
RATIOS = (0.0, 0.25, 0.5, 0.65)
PLANS = 4  # sets of masks that steps take in turn
ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "fused": F.scaled_dot_product_attention,
    "materialised": plain_attention,
}


class Steps:
    """Training steps of one recipe at one throwing ratio."""

    def __init__(self, recipe: Recipe, method: Method, images: Tensor) -> None:
        sampler, batch = recipe.sampler(), len(images)
        self.recipe, self.method, self.images, self.count = recipe, method, images, 0
        self.plans: list[MaskPlan] = [
            sampler.stack([sampler(sampler.seed(recipe.seed, epoch, str(i), i)) for i in range(batch)]).to(
                images.device
            )
            for epoch in range(PLANS)
        ]

    def step(self) -> None:
        """Forward and backward, each time under other masks."""
        cuda = self.images.is_cuda
        with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
            loss = self.method(self.images, self.plans[self.count % PLANS]).loss
        loss.backward()
        self.count += 1
        self.method.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()

    def seconds(self) -> float:
        """What one step takes."""
        clock = time.perf_counter if self.images.is_cuda else time.process_time
        begun = clock()
        self.step()
        return clock() - begun

    def peak_bytes(self) -> dict[str, int]:
        """The allocator's peak in a step, weights and gradients included, and what lies there before the step."""
        self.step()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        return {"peak": torch.cuda.max_memory_allocated(), "before": before}


def ratios_of(recipe: Recipe, ratios: Sequence[float]) -> list[float]:
    """Those that leave a masked token to keep."""
    return [ratio for ratio in ratios if ratio < recipe.mask.ratio]


def prepare(recipe: Recipe, ratios: Sequence[float], batch: int, device: torch.device) -> list[Steps]:
    """The steps at every ratio, on one model with the aggregation and one without it, and the same images."""
    size = recipe.data.image_size
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    methods: dict[bool, Method] = {}
    for throwing in sorted({ratio > 0 for ratio in ratios}):
        torch.manual_seed(0)
        methods[throwing] = recipe.method.build(size, recipe.partial, throwing).to(device).train()
    return [Steps(replace(recipe, throw_ratio=ratio), methods[ratio > 0], images) for ratio in ratios]


def interleave(subjects: Sequence[Steps], rounds: int) -> list[list[float]]:
    """Seconds per step of every subject in each round, after one round to warm up."""
    for subject in subjects:
        subject.seconds()
    times: list[list[float]] = [[] for _ in subjects]
    for turn in range(rounds):
        for i in range(len(subjects)):
            at = (turn + i) % len(subjects)
            times[at].append(subjects[at].seconds())
    return times


def counts(recipe: Recipe) -> dict[str, int]:
    """What ``ummim cost`` counts per image."""
    found = cost(replace(recipe, activation_checkpointing="none"))
    return {
        "forward_flops": found.forward_flops,
        "training_flops": found.training_flops,
        "fused_bytes": found.activation_bytes_fused,
        "materialised_bytes": found.activation_bytes_materialised,
    }


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one recipe."""
    device = torch.device(options.device)
    recipe = load_recipe(name, ["throw_ratio=0", *options.set])
    ratios = ratios_of(recipe, options.ratios)
    subjects = prepare(recipe, ratios, options.batch, device)
    rows: list[dict[str, Any]] = [{"throw_ratio": ratio, **counts(subject.recipe)} for ratio, subject in
                                  zip(ratios, subjects, strict=True)]  # fmt: skip
    kinds = ATTENTIONS if device.type == "cuda" else {"fused": F.scaled_dot_product_attention}
    for kind, attention in kinds.items():
        with SwapAttention(attention):
            times = interleave(subjects, options.rounds)
            peaks = [subject.peak_bytes() for subject in subjects] if device.type == "cuda" else []
        for i, row in enumerate(rows):
            against = [own / full for own, full in zip(times[i], times[0], strict=True)]
            row["seconds_" + kind] = {
                "median": statistics.median(times[i]) / options.batch,
                "fastest": min(times[i]) / options.batch,
                "ratio_median": statistics.median(against),
                "ratio_of_fastest": min(times[i]) / min(times[0]),
                "rounds": times[i],
            }
            if peaks:
                row["gpu_bytes_" + kind] = peaks[i]
    return {"recipe": name, "image_size": recipe.data.image_size, "rows": rows}


def print_table(result: dict[str, Any]) -> None:
    """A line for each ratio; in brackets the ratio to r = 0."""
    full, mib = result["rows"][0], 2**20
    print(f"{result['recipe']}: per image; in brackets, of r = {full['throw_ratio']:.0%}")
    header = ("r", "ms/image", "(median, fastest)", "training GFLOPs", "saved MiB: fused", "materialised")
    print("{:>5} {:>9} {:>18} {:>16} {:>18} {:>18}".format(*header))
    for row in result["rows"]:
        seconds = row["seconds_fused"]
        cells = [
            f"{row[key] / unit:.1f} ({row[key] / full[key]:.3f})"
            for key, unit in (("training_flops", 1e9), ("fused_bytes", mib), ("materialised_bytes", mib))
        ]
        print(
            f"{row['throw_ratio']:>5.0%} {seconds['median'] * 1e3:>9.1f}"
            f" {'({ratio_median:.3f}, {ratio_of_fastest:.3f})'.format(**seconds):>18}"
            f" {cells[0]:>16} {cells[1]:>18} {cells[2]:>18}"
        )
        for kind in ATTENTIONS:
            if "gpu_bytes_" + kind in row:
                now, then = row["gpu_bytes_" + kind], full["gpu_bytes_" + kind]
                share = (now["peak"] - now["before"]) / (then["peak"] - then["before"])
                print(
                    f"      GPU, {kind}: peak {now['peak'] / mib:.0f} MiB ({now['peak'] / then['peak']:.3f}), above the"
                    f" weights {share:.3f}; time {row['seconds_' + kind]['ratio_median']:.3f}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", default=METHODS, metavar="RECIPE", help="recipes, by name or file")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe keys to override")
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS, help="the first is what others compare with")
    parser.add_argument("--batch", type=int, help="images in a step (default 4 on a CPU, 64 on a GPU)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args()
    options.batch = options.batch or (64 if options.device.startswith("cuda") else 4)
    cuda = options.device.startswith("cuda")
    machine = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, batch {options.batch}, {options.rounds} rounds in turn")
    results = []
    for name in options.method:
        results.append(measure(name, options))
        print_table(results[-1])
    if options.output:
        values = {
            "device": machine,
            "precision": "bf16 autocast" if cuda else "float32",
            "torch": torch.__version__,
            "batch": options.batch,
            "rounds": options.rounds,
            "results": results,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
