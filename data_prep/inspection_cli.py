"""The command lines of ``index``, ``verify`` and ``inspect``."""

import argparse
import os
from pathlib import Path

from data_prep.arguments import count

COMMANDS = ("index", "verify", "inspect")


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the three commands to those of ``python -m data_prep``."""
    _add_index(commands.add_parser("index", help="make the index of shards that have none"))
    verify = commands.add_parser("verify", help="check shards against their index, decode every image")
    option = verify.add_argument
    option("--fast", action="store_true", help="compare sizes and checksums, decode nothing")
    option("--json", dest="as_json", action="store_true", help="print the report as one JSON object")
    _add_inspect(commands.add_parser("inspect", help="show samples, sizes and classes"))
    for name in COMMANDS:
        command = commands.choices[name]
        command.add_argument("dst", help="folder of shards, or its URL")
        cores = len(os.sched_getaffinity(0))
        command.add_argument("--workers", type=int, default=cores, metavar="N", help="processes (%(default)s)")


def _add_index(index: argparse.ArgumentParser) -> None:
    option = index.add_argument
    option("--image", type=_extensions, metavar="EXT[,EXT...]",
           help="extension of the image in a sample, the preferred one first (jpg,jpeg,png,...)")  # fmt: skip
    option("--label-field", metavar="NAME", help="the label is this field of a sample's .json, not its .cls")
    option("--ignore-labels", action="store_true", help="index without labels")
    option("--last-dot", action="store_true", help="extensions begin at the last dot of a file's name, not the first")
    option("--prefix-keys", action="store_true", help="put the shard's name before each key, where keys repeat")
    option("--skip-incomplete", action="store_true", help="leave out samples without an image or a label")
    option("--out", type=Path, metavar="DIR", help="folder for the index of shards behind a URL (beside the shards)")
    option("--recursive", action="store_true", help="index the shards in all folders below as one data set")


def _add_inspect(inspect: argparse.ArgumentParser) -> None:
    option = inspect.add_argument
    option("--out", type=Path, metavar="PNG", help="the contact sheet (DST/inspect.png)")
    option("--samples", type=count, default=48, metavar="N", help="pictures on the contact sheet (%(default)s)")
    option("--seed", type=int, metavar="S", help="draw them at random (evenly spaced over the shards)")
    option("--measure", type=count, default=10_000, metavar="N",
           help="read the sizes of at most N images, evenly spaced (%(default)s)")  # fmt: skip
    option("--key", metavar="KEY", help="say where this sample lies and what it is, and no more")


def run(options: argparse.Namespace) -> int:
    """Run the command that ``options`` name; returns the exit code."""
    if options.command == "index":
        from data_prep.index import index
        from data_prep.scan import IMAGES, Rules

        rules = Rules(
            image=options.image or IMAGES,
            labels=not options.ignore_labels,
            label_field=options.label_field,
            last_dot=options.last_dot,
            prefix_keys=options.prefix_keys,
            skip_incomplete=options.skip_incomplete,
        )
        print(index(options.dst, options.workers, rules, options.recursive, options.out))
    elif options.command == "verify":
        from data_prep.verify import verify

        summary = verify(options.dst, options.workers, options.fast, options.as_json)
        if summary:
            print(summary)
    else:
        from data_prep.inspection import describe_sample, inspect

        if options.key is not None:
            print(describe_sample(options.dst, options.key))
        else:
            print(inspect(options.dst, options.out, options.samples, options.seed, options.measure, options.workers))
    return 0


def _extensions(text: str) -> tuple[str, ...]:
    names = tuple(name.strip().lower().removeprefix(".") for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of extensions: write jpg, or jpg,png")
    return names
