"""Whole optimizer steps of the large recipes on one GPU: images/s, peak memory and model-FLOPs utilisation.

    python benchmarks/gpu_step.py [RECIPE ...] [--out docs/results/gpu_step.json]
    python benchmarks/gpu_step.py --smoke          # the same code on a CPU, narrow models, two images

Three variants of each recipe, each in a process of its own, at the largest micro-batch that fits:

    plain      eager PyTorch: bf16 autocast over float32 weights, torch.optim.AdamW, no DeepSpeed
    zero1      as train.py runs it: DeepSpeed ZeRO-1, bf16 weights with float32 masters
    compiled   zero1 with ``compile: true``

Utilisation is the FLOPs of forward and backward pass, as ``ummim cost`` counts them (nothing recomputed), over the
bf16 matrix rate that this card reaches on one large product in the same run. Goals: 45% for ViT-L, 30% for Swin-L.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ummim.cost import cost
from ummim.data import Batch
from ummim.masking import sample_seed
from ummim.pretrain import Pretraining
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe

RECIPES = ("mae_vit_large_800e", "um_mae_swin_large_800e")
VARIANTS = ("plain", "zero1", "compiled")
OUT_OF_MEMORY = 3  # a child's exit code
NARROW_DECODER = "method.decoder={embed_dim: 32, depth: 1, num_heads: 2}"
NARROW = {  # the smoke test's models
    "mae_vit_large_800e": ["method.encoder={embed_dim: 64, depth: 2, num_heads: 2}", NARROW_DECODER],
    "um_mae_swin_large_800e": [
        "method.encoder={embed_dim: 16, depths: [1, 1, 2, 1], num_heads: [1, 2, 4, 8]}",
        NARROW_DECODER,
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Optimizer steps of the large recipes on one GPU.")
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--start", type=int, default=64, help="first micro-batch to try; doubled while it fits")
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after three to warm up")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--smoke", action="store_true", help="narrow models and two images, to check the script")
    parser.add_argument("--child", nargs=2, metavar=("VARIANT", "MICRO_BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        variant, micro = options.child
        print(json.dumps(measure(_recipe(options.recipes[0], options.smoke), variant, int(micro), options.steps)))
        return
    results: dict[str, Any] = {**machine(), "command": " ".join(sys.argv), "runs": []}
    print(f"{results['device']}: {results['matrix_rate'] / 1e12:.1f} TFLOP/s in bf16 products of 8192 (1024 on a CPU)")
    for name in options.recipes:
        flops = cost(_recipe(name, options.smoke)).training_flops
        for variant in options.variants:
            run = largest(name, variant, options)
            run["utilisation"] = run["images_per_second"] * flops / results["matrix_rate"]
            results["runs"].append(run)
            print(
                f"{name:<24} {variant:<9} micro-batch {run['micro_batch']:<5} {run['images_per_second']:8.1f} images/s"
                f" {run['peak_gib']:6.1f} GiB  {run['utilisation']:.1%} of the matrix rate",
                flush=True,
            )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """Device, versions, and the measured bf16 matrix rate in FLOP/s."""
    cuda = torch.cuda.is_available()
    side = 8192 if cuda else 1024
    a = torch.randn(side, side, device="cuda" if cuda else "cpu", dtype=torch.bfloat16)

    def product() -> None:
        torch.mm(a, a)
        if cuda:
            torch.cuda.synchronize()

    seconds = statistics.median(_times(product, 20))
    name = torch.cuda.get_device_name() if cuda else f"CPU ({platform.processor() or platform.machine()})"
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "matrix_rate": 2 * side**3 / seconds,
    }


def largest(name: str, variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """The measurement at the largest micro-batch that fits, among ``start`` times powers of two."""
    best, micro = None, 2 if options.smoke else options.start
    while True:
        command = [sys.executable, __file__, name, "--child", variant, str(micro), "--steps", str(options.steps)]
        child = subprocess.run([*command, *(["--smoke"] if options.smoke else [])], stdout=subprocess.PIPE, text=True)
        if child.returncode == OUT_OF_MEMORY and best is None and micro > 1:
            micro //= 2  # look below
            continue
        if child.returncode == OUT_OF_MEMORY and best is not None:
            return best
        if child.returncode:
            raise SystemExit(f"{name} {variant} with micro-batch {micro} ended with {child.returncode}")
        found = json.loads(child.stdout.splitlines()[-1])
        if options.smoke or (best is not None and micro < best["micro_batch"]) or micro < options.start:
            return found
        best, micro = found, 2 * micro


def measure(recipe: Recipe, variant: str, micro: int, steps: int) -> dict[str, Any]:
    """Time ``steps`` optimizer steps of one micro-batch each. Exits with OUT_OF_MEMORY if it does not fit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        step = plain_step(recipe, micro, device) if variant == "plain" else engine_step(recipe, micro, variant, device)
        for _ in range(3):
            step()
        times = _times(step, steps)
    except torch.cuda.OutOfMemoryError:
        sys.exit(OUT_OF_MEMORY)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "recipe": recipe.name,
        "variant": variant,
        "micro_batch": micro,
        "images_per_second": micro / statistics.median(times),
        "seconds_per_step": times,
        "peak_gib": peak / 2**30,
    }


def plain_step(recipe: Recipe, micro: int, device: torch.device) -> Callable[[], None]:
    """Forward, backward and AdamW step in eager PyTorch with autocast."""
    task, batch = Pretraining(_build(recipe)).to(device), _batch(recipe, micro, device)
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-4, betas=recipe.optim.betas)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = task(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(device)

    return step


def engine_step(recipe: Recipe, micro: int, variant: str, device: torch.device) -> Callable[[], None]:
    """The same through DeepSpeed, as ``train.py`` does it."""
    from ummim.engine import zero

    zero.setup_distributed()
    recipe = replace(recipe, zero_stage=1, precision="bf16", global_batch=micro, micro_batch=micro)
    method = _build(recipe)
    if variant == "compiled":
        method.compile(dynamic=False)
    engine = zero.initialize(Pretraining(method), recipe, recipe.plan(1, samples=micro))
    batch = _batch(recipe, micro, device)

    def step() -> None:
        zero.backward(engine, engine(batch).loss)
        zero.step(engine)
        _wait(device)

    return step


def _recipe(name: str, smoke: bool) -> Recipe:
    return load_recipe(name, NARROW[name] if smoke else [])


def _build(recipe: Recipe) -> Any:
    torch.manual_seed(0)
    return recipe.method.build(recipe.data.image_size, recipe.partial, recipe.throw_ratio > 0)


def _batch(recipe: Recipe, micro: int, device: torch.device) -> Batch:
    size, sampler = recipe.data.image_size, recipe.sampler()
    images = torch.randint(0, 256, (micro, 3, size, size), dtype=torch.uint8)
    plan = sampler.stack([sampler(sample_seed(0, 0, str(i))) for i in range(micro)])
    return Batch(images, plan, torch.zeros(micro, dtype=torch.int64), [str(i) for i in range(micro)]).to(device)


def _times(function: Callable[[], None], count: int) -> list[float]:
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
