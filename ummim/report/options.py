"""The options of ``ummim report``."""

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Define them, and what the command runs."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, metavar="HTML", help="default: report.html in the first run's folder")
    parser.add_argument("--shards", metavar="FOLDER", help="where the runs' shards are now, if they have moved")
    parser.add_argument("--no-encoder", action="store_true", help="load no checkpoint: no look into the encoder")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from ummim.report.page import write_report

    path = write_report(options.runs, options.out, look=not options.no_encoder, shards=options.shards)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
