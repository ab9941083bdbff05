"""The options of ``ummim rehearse``. Imports nothing that takes time."""

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="packaged name or path")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="applied before the recipe is shrunk")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep all files there; new or empty")
    parser.add_argument("--finetune", metavar="RECIPE", help="the evaluation to end with, instead of the linked one")
    parser.add_argument("--record", action="store_true", help="note a pass in ummim/recipes/status.json (maintainers)")
