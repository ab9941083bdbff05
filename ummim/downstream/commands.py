"""The command line of what is done with trained classifiers: ``ummim robustness``."""

import argparse
import os
from pathlib import Path
from typing import Any

from ummim.errors import UserError

SETS = {
    "val": "ImageNet's validation images, beside the others",
    "imagenet-a": "ImageNet-A: 200 classes, among which the model chooses",
    "imagenet-r": "ImageNet-R: likewise",
    "imagenet-sketch": "ImageNet-Sketch",
    "imagenet-c": "ImageNet-C: its 15 corruptions, each with the folders 1 to 5",
}


def add_commands(commands: Any) -> None:
    """Add the commands to a parser's sub-parsers."""
    told = "a classifier's accuracy on ImageNet-A, -R, -Sketch and -C; also under torchrun"
    robustness = commands.add_parser("robustness", help=told)
    robustness.add_argument("weights", type=Path, metavar="RUN", help="a fine-tuning's folder, one of its "
                            "checkpoints/step-N, or an official fine-tuned file")  # fmt: skip
    for name, told in SETS.items():
        robustness.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"{told} (class folders, or shards)")
    robustness.add_argument("--family", help="of an official file, such as mae_vit")
    robustness.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="WordNet ids in label order, one a line (default: those of the run's data, else ImageNet-1K's)",
    )
    robustness.add_argument("--ema", action="store_true", help="a fine-tuning's moving average of the weights")
    robustness.add_argument("--batch", type=int, default=64, help="images at once on a rank (default 64)")
    robustness.add_argument("--workers", type=int, default=4, help="processes that read on a rank (default 4)")
    robustness.add_argument("--json", type=Path, metavar="FILE", help="write the results, as JSON")
    robustness.set_defaults(run=_robustness)


def _robustness(options: argparse.Namespace) -> None:
    from ummim.downstream.robustness import ALONE, Reading, measure, table, write_json
    from ummim.downstream.subject import load_subject
    from ummim.engine.zero import setup_distributed, shutdown

    places = {name: getattr(options, name.replace("-", "_")) for name in SETS}
    places = {name: place for name, place in places.items() if place is not None}
    if not places:
        raise UserError(f"robustness: name at least one set: {', '.join(f'--{name} DIR' for name in SETS)}")
    for name, least in (("batch", 1), ("workers", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least {least}")
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    reading = Reading(options.batch, options.workers, setup_distributed() if several else ALONE)
    subject, told = reading.together(
        lambda: load_subject(options.weights, options.family, options.classes, options.ema)
    )
    results = measure(subject, places, reading)
    if reading.world.is_main:
        print(table(results), flush=True)
        if options.json is not None:
            write_json(options.json, told, results)
    if several:
        shutdown()
