"""The command line of ``ummim evaluate``. Imports nothing that takes time."""

import argparse
from pathlib import Path
from typing import Any

from ummim.errors import UserError


def add_evaluate(commands: Any) -> None:
    """Add the command to a parser's sub-parsers."""
    parser = commands.add_parser("evaluate", help="a fine-tuning's or a probe's accuracy; also under torchrun")
    parser.add_argument("folder", type=Path, metavar="RUN", help="its folder, or one of its checkpoints/step-N")
    parser.add_argument("--shards", metavar="FOLDER", help="evaluate on these (default: the run's validation shards)")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    parser.add_argument("--batch", type=int, metavar="N", help="images at once on a rank (default: the micro_batch)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read (default: the run's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from ummim.downstream.evaluated import evaluate_run

    for name, least in (("batch", 1), ("workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    return evaluate_run(options.folder, options.shards, options.ema, options.batch, options.workers, options.json)
