"""The commands ``ummim preflight`` and ``ummim status``."""

import argparse
import os
from pathlib import Path
from typing import Any

from ummim.errors import UserError

DEFAULT_PORT = 29500


def add_commands(commands: Any) -> None:
    """Add both to the subparsers of ``ummim``."""
    preflight = commands.add_parser("preflight", help="check every host of a job before it starts")
    preflight.add_argument("recipe", help="packaged name or path")
    preflight.add_argument("overrides", nargs="*", metavar="key=value", help="as for train.py")
    where = preflight.add_mutually_exclusive_group()
    where.add_argument("--hostfile", type=Path, metavar="FILE", help="lines NAME slots=GPUS; reached by ssh")
    where.add_argument("--slurm", action="store_true", help="the nodes of this Slurm job; reached by srun")
    preflight.add_argument("--master-addr", metavar="ADDRESS", help="of the first host (default: found)")
    preflight.add_argument("--port", type=int, default=DEFAULT_PORT, help="of the rendezvous (default %(default)s)")
    preflight.add_argument("--free-gib", type=float, default=20, metavar="GIB", help="to be free in the output folder")
    preflight.add_argument("--address-file", type=Path, metavar="FILE", help="write the first host's address there")
    preflight.set_defaults(run=_preflight)

    status = commands.add_parser("status", help="how far a run has come; exit code 0 only when it has ended")
    status.add_argument("recipe", metavar="RUN", help="a run's folder, or a recipe as for train.py")
    status.add_argument("overrides", nargs="*", metavar="key=value", help="with a recipe: as for train.py")
    status.set_defaults(run=_status)


def _preflight(options: argparse.Namespace) -> None:
    from ummim.cluster.hosts import read_hostfile, slurm_hosts
    from ummim.cluster.preflight import preflight
    from ummim.cluster.remote import srun_command, ssh_command
    from ummim.recipe_file import load_recipe
    from ummim.run_config import RunConfig

    if options.hostfile is not None:
        hosts, command = read_hostfile(options.hostfile), ssh_command
    elif options.slurm:
        hosts, command = slurm_hosts(os.environ), srun_command
    else:
        raise UserError("preflight: give --hostfile FILE, or --slurm inside a Slurm job")
    recipe = load_recipe(options.recipe, options.overrides, RunConfig)
    found = preflight(recipe, hosts, command, options.master_addr, options.port, int(options.free_gib * 2**30))
    print(found.report)
    if options.address_file is not None:
        options.address_file.write_text(found.address + "\n")


def _status(options: argparse.Namespace) -> int:
    from ummim.cluster.status import status

    found = status(options.recipe, options.overrides)
    print(found)
    return 0 if found.ended else 1
