"""Command line: ``python -m data_prep build SRC DST``, ``index DST``, ``verify DST``."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ummim.errors import run_main

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 all is well, 2 the data or the command line is at fault, 130 Ctrl-C."""
    options = _parser().parse_args(argv)
    try:
        return run_main(lambda: _run(options))
    except KeyboardInterrupt:
        print("ummim: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    # Imported here, so that --help and a mistyped option answer at once.
    if options.command == "build":
        from data_prep.build import BuildOptions, build

        fields = {name: getattr(options, name) for name in BuildOptions.__dataclass_fields__}
        print(build(options.src, options.dst, BuildOptions(**fields), options.workers, options.overwrite))
    elif options.command == "index":
        from data_prep.index import index

        print(index(options.dst, options.workers, options.ignore_labels))
    else:
        from data_prep.verify import verify

        print(verify(options.dst, options.workers))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description="Tar shards (WebDataset) with an index, for ummim."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{build,index,verify}")
    build = commands.add_parser("build", help="make shards from images")
    option = build.add_argument
    option("src", type=Path, help="labelled tree (a folder per class), flat folder, or IDX (MNIST) files")
    option("dst", type=Path, help="folder for the shards; an interrupted build goes on where it was")
    option(
        "--shard-count",
        type=_count,
        default=1000,
        metavar="N",
        help="samples per shard (%(default)s)",
    )
    option("--shard-bytes", type=_size, metavar="SIZE", help="close a shard once it has SIZE bytes, e.g. 256MB")
    option("--shuffle-seed", type=int, default=0, metavar="S", help="seed of the samples' order (%(default)s)")
    option("--no-shuffle", dest="shuffle_seed", action="store_const", const=None, help="sort by path instead")
    option("--limit", type=_count, metavar="N", help="take only N images, the first ones after shuffling")
    option("--short-side", type=_count, metavar="PX", help="shrink larger images to this short side")
    option("--quality", type=_quality, metavar="Q",
           help="make every image a JPEG of quality Q (keep the file's bytes; shrunk images get 95)")  # fmt: skip
    option("--unlabelled", action="store_true", help="take all images at any depth, without labels")
    option("--max-bad", type=_share, default=0.01, metavar="SHARE",
           help="share of unreadable images that is left out instead of failing (%(default)s)")  # fmt: skip
    option("--overwrite", action="store_true", help="replace the shards that lie in DST")
    index = commands.add_parser("index", help="make the index of shards that have none")
    index.add_argument("--ignore-labels", action="store_true", help="do not read .cls members")
    verify = commands.add_parser("verify", help="check shards against their index, decode every image")
    for command in (index, verify):
        command.add_argument("dst", type=Path, help="folder of shards")
    for command in (build, index, verify):
        cores = len(os.sched_getaffinity(0))
        command.add_argument("--workers", type=int, default=cores, metavar="N", help="processes (%(default)s)")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _quality(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{value} is not between 1 and 100")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def _size(text: str) -> int:
    match = re.fullmatch(r"([1-9]\d*)\s*([kMGT]?)B?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 500000, 256MB or 1GB")
    return int(match[1]) * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[match[2]]


if __name__ == "__main__":
    sys.exit(main())
