"""The options of ``ummim capacity``. Imports nothing that takes time."""

from __future__ import annotations

import argparse
from dataclasses import fields

from ummim.capacity.gpus import GPUS, Assumptions


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="packaged name or path")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="default 8")
    parser.add_argument("--gpu", metavar="NAME", help=", ".join(GPUS))
    parser.add_argument("--gpu-tflops", type=float, metavar="T", help="dense peak in the recipe's precision")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="10^9 bytes")
    parser.add_argument("--network-gbits", type=float, metavar="GBIT", help="of a node, per second and direction")
    parser.add_argument(
        "--measured-images-per-second", type=float, metavar="R",
        help="what one GPU was seen to train with this recipe, alone; takes the place of --efficiency",
    )  # fmt: skip
    parser.add_argument("--blocking-checkpoints", action="store_true", help="training waits until they are written")
    parser.add_argument("--json", action="store_true", help="one JSON object; docs/scaling.md explains its keys")
    assumptions = parser.add_argument_group("what is assumed (docs/scaling.md)")
    for field in fields(Assumptions):
        option = "--" + field.name.replace("_", "-")
        assumptions.add_argument(
            option, type=float, default=field.default, metavar="X", help=f"default {field.default}"
        )


def run(options: argparse.Namespace) -> str:
    """The report that the options ask for."""
    import json

    from ummim.capacity.gpus import find_gpu
    from ummim.capacity.report import Cluster, report
    from ummim.capacity.text import text
    from ummim.recipe_file import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    gpu = find_gpu(options.gpu, options.gpu_tflops, options.gpu_memory, options.network_gbits)
    assumed = Assumptions(**{field.name: getattr(options, field.name) for field in fields(Assumptions)})
    cluster = Cluster(options.nodes, options.gpus_per_node, gpu, assumed)
    values = report(recipe, cluster, options.measured_images_per_second, not options.blocking_checkpoints)
    return json.dumps(values, indent=2) if options.json else text(values)
