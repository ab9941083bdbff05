"""What is each method's encoder worth? All at an equal compute budget, on two small labelled sets.

    apt-get install dataset-fashion-mnist openclipart-png
    python benchmarks/evidence.py [--jobs N] [--seeds N] [--output docs/results/evidence.json] [--smoke]

For each set, seed and method, by this system's own commands: ``train.py`` pre-trains a recipe of benchmarks/evidence/
until the budget of FLOPs is spent, as ``ummim cost`` counts them, then fine-tunes on a few labels and trains a linear
probe. The controls are the same encoders from fresh weights. A seed has its own weights, order, masks and labels.

Cut off, the same command goes on where it was. ``evidence_report.py`` makes the tables of docs/results.md.
"""

import argparse
import json
import multiprocessing
import os
import runpy
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from evidence_data import Set, clipart, fashion
from small_study import provenance
from torch.utils.flop_counter import FlopCounterMode

from ummim.atomic import write_text
from ummim.cost import build_on_meta, cost, meta_inputs
from ummim.methods.amt import AMT
from ummim.recipe import Recipe
from ummim.recipe_file import dump_recipe, load_recipe
from ummim.run_config import RunConfig

RECIPES = Path(__file__).with_name("evidence")
METHODS = ("mae", "pr_mae", "simmim", "um_mae", "green_mim", "local_mim", "mff", "tec", "amt")
CONTROLS = {"vit": "mae", "relative_vit": "simmim", "um_swin": "um_mae", "swin": "green_mim"}  # whose encoder it is
BUDGET = 1.6e12  # FLOPs of a pre-training
IMAGES = 2500  # that are pre-trained on
SMOKE = {"optim.warmup_epochs": 0, "max_steps": 3}

Words = dict[str, Any]
_FORKS = multiprocessing.get_context("forkserver")
_STARTING = threading.Lock()  # a process is started from one thread at a time


def main() -> None:
    parser = argparse.ArgumentParser(description="every method at an equal compute budget, fine-tuned and probed")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each (default: 1)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--runs", type=Path, help="data, runs and logs (default: runs/evidence)")
    parser.add_argument("--output", type=Path, help="the results (default: results.json there)")
    parser.add_argument("--smoke", action="store_true", help="three steps of everything; the numbers mean nothing")
    args = parser.parse_args()
    _FORKS.set_forkserver_preload(["train", "deepspeed", "timm", "ummim.pretrain", "ummim.downstream.run"])
    runs = (args.runs or Path("runs/evidence_smoke" if args.smoke else "runs/evidence")).resolve()
    output = args.output or runs / "results.json"
    test = 100 if args.smoke else 2000
    sets = [
        fashion(runs / "data/fashion", args.seeds, IMAGES, 200, test),
        clipart(runs / "data/clipart", args.seeds, IMAGES, 15, 60),
    ]
    sizes = [{"name": data.name, "classes": data.classes, "epochs": data.epochs} for data in sets]
    begun, results = time.monotonic(), list[dict[str, Any]]()
    tasks = [(data, seed, row) for seed in range(args.seeds) for data in sets for row in (*CONTROLS, *METHODS)]
    with ThreadPoolExecutor(args.jobs) as pool:
        started = [pool.submit(run, runs, *each, SMOKE if args.smoke else {}) for each in tasks]
        try:
            for task in started:
                results.append(task.result())
                told = {**provenance(), "budget": BUDGET, "images": IMAGES, "sets": sizes}
                write_text(output, json.dumps({**told, "rows": results}, indent=1, default=str) + "\n")
                row = results[-1]
                print(f"{time.monotonic() - begun:6.0f} s {row['set']:8} seed {row['seed']} {row['row']:12} "
                      f"fine-tuned {row['fine_tuned']:.1f} linear {row['linear']:.1f}", flush=True)  # fmt: skip
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what runs ends, nothing else begins
            raise


def run(runs: Path, data: Set, seed: int, row: str, more: Words) -> dict[str, Any]:
    """Pre-train, unless ``row`` is a control, fine-tune and probe."""
    folder, own = runs / data.name / f"seed-{seed}" / row, {"seed": seed, **more}
    result: dict[str, Any] = {"set": data.name, "seed": seed, "row": row}
    weights = ""
    if row in METHODS:
        weights = str(folder / "pretraining")
        result["flops"] = pretrain(row, folder, data, own)
    for name, key in (("finetune", "fine_tuned"), ("linear", "linear")):
        values = own | {
            "output": str(folder / name),
            "data.shards": data.shards(f"labels-{seed}"),
            "epochs": data.epochs,
            "classify.val_shards": data.shards("test"),
            "classify.classes": data.classes,
            "classify.weights": weights,
            "classify.encoder": encoder(CONTROLS.get(row, row)),
        }
        train(name, values)
        result[key] = json.loads((folder / name / "evaluation.json").read_text())["top1"]
    return result


def pretrain(row: str, folder: Path, data: Set, own: Words) -> float:
    """Spend the budget; returns the FLOPs spent. TEC's teacher, an MAE, has the first half of TEC's."""
    spent, common = 0.0, own | {"data.shards": data.shards("pretraining")}
    if row == "tec":
        teacher, file = folder / "teacher", folder / "teacher.safetensors"
        epochs, spent = epochs_for("mae", BUDGET / 2)
        train("mae", common | {"epochs": epochs, "output": str(teacher)})
        if not file.exists():
            command(["-m", "ummim", "export", str(teacher), str(file), "--format", "timm"], folder / "export.log")
        common |= {"method.teacher.checkpoint": str(file)}
    epochs, last = epochs_for(row, BUDGET - spent)
    values = common | {"epochs": epochs, "output": str(folder / "pretraining")}
    train(row, values)
    return spent + last


def encoder(row: str) -> Words:
    """A method's encoder for whole images; UM-MAE doubles the window of its Swin, as the compact one sees half."""
    found = asdict(recipe(row).method.encoder)  # type: ignore[attr-defined]
    if found["kind"] == "um_swin":
        found["window_size"] *= 2
    return found


@cache
def recipe(row: str) -> Recipe:
    found = load_recipe(str(RECIPES / f"{row}.yaml"), ["data.shards=/nowhere"], Recipe)
    assert isinstance(found, Recipe)
    return found


@cache
def epochs_for(row: str, budget: float) -> tuple[int, float]:
    """The epochs that come closest to a budget of FLOPs, and what they take."""
    costs = [0.0]
    while costs[-1] < budget:
        costs.append(costs[-1] + epoch_flops(row, len(costs) - 1))
    epochs = min(range(1, len(costs)), key=lambda n: abs(costs[n] - budget))
    return epochs, costs[epochs]


@cache
def epoch_flops(row: str, done: int) -> float:
    """FLOPs of the epoch after ``done`` others. AMT: without attention maps at first; then also those of the maps."""
    attention = recipe(row).method.attention
    if attention is None:
        return IMAGES * per_image(row, True)
    begun, left = divmod(done, attention.refresh_epochs)
    return IMAGES * (per_image(row, begun > 0) + (map_flops(row) if begun and not left else 0))


@cache
def per_image(row: str, attention: bool) -> float:
    return cost(recipe(row), attention).training_flops


@cache
def map_flops(row: str) -> float:
    """Of one image's attention map: a forward pass of the whole image."""
    method, (images, _) = build_on_meta(recipe(row)), meta_inputs(recipe(row))
    assert isinstance(method, AMT)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        method.encoder(images)
    return counter.get_total_flops() / len(images)


def train(name: str, values: Words) -> None:
    """``python train.py RECIPE key=value ...``, unless that has run to its end, as a file beside its folder tells."""
    path, place = RECIPES / f"{name}.yaml", Path(values["output"])
    words = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    resolved = dump_recipe(load_recipe(str(path), words, RunConfig))
    done = place.with_suffix(".done")
    if not done.exists():
        command(["train.py", str(path), *words], place.with_suffix(".log"))
        write_text(done, resolved)
    elif done.read_text() != resolved:
        raise SystemExit(f"{done} is of other settings: remove {place}* or give another --runs folder")


def command(words: Sequence[str], log: Path) -> None:
    """Run ``python WORDS...`` in a process forked from one that has imported everything; it must end well."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with _STARTING:
        process = _FORKS.Process(target=become, args=(list(words), str(log)))
        process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"exit code {process.exitcode}: python {' '.join(words)}\n{log}:\n{log.read_text()[-2000:]}")


def become(words: list[str], log: str) -> None:
    """Run a program with its output in a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    module = words[0] == "-m"
    sys.argv = words[module:]
    if module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
