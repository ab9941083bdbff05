"""Does partial reconstruction lose accuracy? PR-MIM's Table 2 in small: MAE on Fashion-MNIST, paired by seed.

    apt-get install dataset-fashion-mnist
    nice -n 10 python benchmarks/accuracy_study.py [--rows table|options|simmim|tec|all] [--jobs N] [--device cuda]
        [--output FILE.json] [--plot FILE.png] [--smoke]

A small MAE is pre-trained on 28x28 pixels in 2x2 patches: a grid of 14x14 tokens, 49 of them visible, as ViT-B/16
has on ImageNet. For each seed, every row of the table starts from the same weights and sees the same images in the
same order under the same masks; only which masked tokens are thrown, and how they are filled in, differs. Then the
encoder is fine-tuned on a few labels and probed without; a control is fine-tuned from scratch.

Every part (a row's pre-training or tuning, of one seed) writes its results when it ends; a study that was cut off
goes on with the next one. Seed 0 of all rows comes first.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from accuracy_models import GRID, PATCH, Model, build, classifier
from accuracy_report import plot, print_tables, summarise
from accuracy_rows import GROUPS, Row
from fashion_mnist import Data
from safetensors.torch import save_file
from small_study import Pretraining, Tuning, batches, curve_of, optimise, provenance, stored, tune
from torch import Tensor

from ummim.atomic import write_text
from ummim.masking import MaskPlan, PlanSampler, sample_seed
from ummim.methods.api import Method
from ummim.nn.layers import take
from ummim.nn.targets import mean_squared_error, normalise_patches, patchify, pixel_targets


@dataclass(frozen=True)
class Study:
    seeds: int = 3
    model: Model = field(default_factory=Model)
    pretraining: Pretraining = field(
        default_factory=lambda: Pretraining(60000, 1600, 16, held_out_images=1000, curve_every=50)
    )
    tuning: Tuning = field(default_factory=lambda: Tuning(labels=1000, batch=16))


SMOKE = Study(
    1, Model(16, 1, 2, 16, 1, 2), Pretraining(64, 3, 8, held_out_images=16, curve_every=1), Tuning(32, 1, 8, 1e-3, 32)
)


@cache
def load(folder: Path, device: str) -> Data:
    return Data(folder, margin=0, scale=1, device=device)


def draw_plan(sampler: PlanSampler, seed: int, epoch: int, ids: Sequence[int]) -> MaskPlan:
    return sampler.stack([sampler(sample_seed(seed, epoch, str(i))) for i in ids])


def fingerprint(sampler: PlanSampler) -> str:
    """A hash of some plans: stored results of a sampler that draws others are not gone on with."""
    plan = draw_plan(sampler, 0, 0, range(8))
    return hashlib.blake2b(torch.cat([plan.visible, plan.kept], 1).numpy().tobytes(), digest_size=8).hexdigest()


def pretrain(row: Row, seed: int, data: Data, study: Study, device: str, weights: Path) -> dict[str, Any]:
    """The row's training curve, held-out losses, and seconds of training (of the processor, on a CPU)."""
    sizes = study.pretraining
    teacher = weights.with_name(f"full-{seed}.safetensors")
    method, sampler = build(row, study.model, seed, teacher).to(device), PlanSampler(GRID, row.mask, row.ratio)
    batch_at = batches(min(sizes.images, len(data.train_images)), sizes.batch, seed)
    clock = time.perf_counter if device == "cuda" else time.process_time  # other work on the machine counts less

    def loss_of(step: int) -> Tensor:
        epoch, ids = batch_at(step)
        plan = draw_plan(sampler, seed, epoch, ids.tolist())
        return method(data.inputs(data.train_images[ids]), plan.to(device)).loss

    start = clock()
    losses = optimise(method, loss_of, sizes.steps, sizes.lr, (0.9, 0.95))
    seconds = round(clock() - start, 1)
    save_file(method.backbone().state_dict(), weights)
    held_out = held_out_losses(method, row, data, sizes.held_out_images, device)
    return {"curve": curve_of(losses, sizes.curve_every), **held_out, "pretraining_seconds": seconds}


@torch.no_grad()
def held_out_losses(method: Method, row: Row, data: Data, count: int, device: str) -> dict[str, float]:
    """Mean losses of the first ``count`` test images, under masks that are the same for all runs.

    Over the kept tokens (MAE only); over all masked tokens, where the row predicts the thrown ones; and over all
    masked tokens with nothing thrown, which every row can decode.
    """
    own, whole = PlanSampler(GRID, row.mask, row.ratio), PlanSampler(GRID, row.mask)
    totals = dict.fromkeys(("kept_loss", "masked_loss", "whole_loss"), 0.0)
    for ids in torch.arange(count).split(100):
        images, share = data.inputs(data.test_images[ids]), len(ids) / count
        plan = draw_plan(own, -1, 0, ids.tolist()).to(device)
        output = method(images, plan)
        if row.method == "mae":
            target = pixel_targets(images, plan.kept, PATCH, method.norm_pix_loss)
            totals["kept_loss"] += mean_squared_error(take(output.prediction, plan.kept), target).item() * share
        totals["masked_loss"] += output.loss.item() * share
        totals["whole_loss"] += method(images, draw_plan(whole, -1, 0, ids.tolist()).to(device)).loss.item() * share
    if row.method != "mae":
        del totals["kept_loss"]
    if output.ids.shape[1] < plan.masked.shape[1]:
        del totals["masked_loss"]
    return totals


def changed(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults: a new option leaves stored results valid."""
    return {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}


def run(row: Row, seed: int, folder: Path, study: Study, device: str, runs: Path) -> dict[str, Any]:
    """A row of one seed: pre-training, if it is no control, then tuning."""
    torch.set_num_threads(1)
    data, name = load(folder, device), row.name
    settings: dict[str, Any] = {"model": asdict(study.model)}
    pretrained, weights = dict[str, Any](), None
    if not row.pretrained and row.method != "mae":
        settings |= {"method": row.method}
    if row.pretrained:
        weights, sampler = runs / f"{name}-{seed}.safetensors", PlanSampler(GRID, row.mask, row.ratio)
        settings |= {"ratio": row.ratio, "partial": changed(row.partial), "plans": fingerprint(sampler)}
        settings |= {"pretraining": asdict(study.pretraining)}
        if row.method != "mae":
            settings |= {"method": row.method, "attention_pass": row.attention_pass}
        if row.method == "tec" and not (runs / f"full-{seed}.safetensors").exists():
            sys.exit(f"{name} learns from the encoder of the row full: run --rows table first")
        pretrained = stored(
            runs / f"{name}-{seed}-pretraining.json",
            settings,
            partial(pretrain, row, seed, data, study, device, weights),
        )
    settings |= {"tuning": asdict(study.tuning)}

    def tuning() -> dict[str, float]:
        return tune(classifier(row.method, study.model, seed, weights).to(device), data, study.tuning, seed)

    tuned = stored(runs / f"{name}-{seed}-tuning.json", settings, tuning)
    return {
        "row": name,
        "seed": seed,
        **pretrained,
        **tuned,
        "seconds": pretrained.get("seconds", 0) + tuned["seconds"],
    }


def run_all(tasks: Sequence[tuple[Row, int]], jobs: int, *shared: Any) -> Iterator[dict[str, Any]]:
    """The results in the order of ``tasks``, as they come; one job runs in this process."""
    if jobs == 1:
        yield from (run(row, seed, *shared) for row, seed in tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from (future.result() for future in [pool.submit(run, row, seed, *shared) for row, seed in tasks])


def baselines(data: Data, model: Model, count: int) -> dict[str, float]:
    """Held-out losses of predicting 0, and of predicting each patch by the mean of its position over these images."""
    patches = patchify(data.inputs(data.test_images[:count]), PATCH)
    patches = normalise_patches(patches)[0] if model.norm_pix_loss else patches
    return {
        "zero": patches.square().mean().item(),
        "mean_of_position": (patches - patches.mean(0)).square().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="PR-MIM's Table 2 in small, on Fashion-MNIST")
    parser.add_argument("--rows", choices=tuple(GROUPS), default="table", help="which rows (default: table)")
    parser.add_argument("--seeds", type=int, help="how many (default: 3)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="IDX files")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy_study"), help="results part by part")
    parser.add_argument("--output", type=Path, help="write the results there, as JSON, after every run")
    parser.add_argument("--plot", type=Path, help="draw the figure there (needs matplotlib)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything; the numbers mean nothing")
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    study, rows = SMOKE if args.smoke else Study(), GROUPS[args.rows]
    args.runs.mkdir(parents=True, exist_ok=True)
    tasks = [(row, seed) for seed in range(args.seeds or study.seeds) for row in rows]
    results: dict[str, Any] = {
        **provenance(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "study": {**asdict(study), "seeds": args.seeds or study.seeds},
        "baselines": baselines(load(args.data, device), study.model, study.pretraining.held_out_images),
    }
    runs: list[dict[str, Any]] = []
    for result in run_all(tasks, args.jobs, args.data, study, device, args.runs):
        runs.append(result)
        results |= {"summary": summarise(runs), "runs": runs}
        if args.output:
            write_text(args.output, json.dumps(results, indent=1) + "\n")
    print_tables(results["summary"])
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
