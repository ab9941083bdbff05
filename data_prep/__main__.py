"""Command line: ``python -m data_prep build SRC DST``, ``index DST``, ``verify DST``, ``inspect DST``."""

import argparse
import sys
from collections.abc import Sequence

from data_prep import build_cli, inspection_cli
from ummim.errors import run_main

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 all is well, 2 the data or the command line is at fault, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description="Tar shards (WebDataset) with an index, for ummim."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{build,index,verify,inspect}")
    build_cli.add_command(commands)
    inspection_cli.add_commands(commands)
    options = parser.parse_args(argv)
    command = build_cli if options.command == "build" else inspection_cli
    try:
        return run_main(lambda: command.run(options))
    except KeyboardInterrupt:
        print("ummim: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
