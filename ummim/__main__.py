"""Command line: ``ummim recipes``, ``show``, ``cost``, ``capacity``, ``export``, ``reconstruct``, ``replay``,
``preflight``, ``status``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ummim.capacity.options import add_options as add_capacity_options
from ummim.errors import UserError, run_main


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 2 the user's mistake, 130 Ctrl-C."""
    options = _parser().parse_args(argv)
    try:
        return run_main(lambda: options.run(options))
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ummim", description="Masked image modelling pre-training.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    recipes = commands.add_parser("recipes", help="list the packaged recipes, with published accuracy and cost")
    recipes.set_defaults(run=_recipes)

    show = commands.add_parser("show", help="print a recipe, fully resolved")
    show.add_argument("recipe", help="packaged name or path")
    show.add_argument("overrides", nargs="*", metavar="key=value")
    show.set_defaults(run=_show)

    cost = commands.add_parser("cost", help="FLOPs and activation memory for each image, beside full reconstruction")
    cost.add_argument("recipe", help="packaged name or path")
    cost.add_argument("overrides", nargs="*", metavar="key=value")
    cost.add_argument("--json", action="store_true", help="one JSON object; docs/cost.md explains its keys")
    cost.set_defaults(run=_cost)

    capacity = commands.add_parser("capacity", help="whether a recipe fits a cluster, its time, price and checkpoints")
    add_capacity_options(capacity)
    capacity.set_defaults(run=_capacity)

    export = commands.add_parser("export", help="write a checkpoint's weights for other programs")
    export.add_argument("checkpoint", type=Path, help="a run's folder, or one of its checkpoints/step-N")
    export.add_argument("out", type=Path, help="the file to write")
    export.add_argument(
        "--format",
        choices=("safetensors", "timm", "official"),
        default="safetensors",
        help="safetensors: the encoder (a ViT's loads strictly in timm); timm: the same, refused for encoders that "
        "timm does not have; official: the whole model under the paper code's names, as a .pth",
    )
    export.set_defaults(run=_export)

    reconstruct = commands.add_parser("reconstruct", help="draw what a checkpoint makes of images")
    reconstruct.add_argument("checkpoint", type=Path, help="a run's folder, or one of its checkpoints/step-N")
    reconstruct.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    reconstruct.add_argument("--out", type=Path, required=True, metavar="PNG")
    reconstruct.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="CHECKPOINT", help="other checkpoints, drawn beside it"
    )
    reconstruct.add_argument("--seed", type=int, default=0, help="of the masks (default 0)")
    reconstruct.set_defaults(run=_reconstruct)

    replay = commands.add_parser("replay", help="read a step's batch again: its sample keys, crops and masks")
    replay.add_argument("folder", type=Path, metavar="RUN", help="a run's folder, or a step-N of its bad_steps")
    replay.add_argument("--step", type=int, metavar="N", help="as in metrics.jsonl; the first is 1")
    replay.add_argument("--out", type=Path, metavar="PNG", help="draw the crops and their masks")
    replay.add_argument("--save", type=Path, metavar="FILE.safetensors", help="write images, masks, labels and keys")
    replay.add_argument("--shards", metavar="FOLDER", help="where the run's shards are now, if they have moved")
    replay.set_defaults(run=_replay)

    from ummim.cluster.commands import add_commands

    add_commands(commands)
    return parser


# Each command imports what it needs, so that --help and a mistyped option answer at once.


def _recipes(options: argparse.Namespace) -> None:
    from ummim.recipe_list import recipe_table

    print(recipe_table())


def _show(options: argparse.Namespace) -> None:
    from ummim.recipe_file import dump_recipe, load_recipe

    print(dump_recipe(load_recipe(options.recipe, options.overrides)), end="")


def _cost(options: argparse.Namespace) -> None:
    import json

    from ummim.cost import report, table
    from ummim.recipe_file import load_recipe

    values = report(load_recipe(options.recipe, options.overrides))
    print(json.dumps(values, indent=2) if options.json else table(values))


def _capacity(options: argparse.Namespace) -> None:
    from ummim.capacity.options import run

    print(run(options))


def _export(options: argparse.Namespace) -> None:
    from ummim.interop.export import export
    from ummim.interop.run import load_run

    recipe, method, checkpoint = load_run(options.checkpoint)
    print(f"{checkpoint} -> {export(recipe, method, options.out, options.format)}")


def _reconstruct(options: argparse.Namespace) -> None:
    from ummim.interop.run import load_run
    from ummim.reconstruct import compare_files, reconstruct_files

    recipe, method, checkpoint = load_run(options.checkpoint)
    if options.compare:
        others = [load_run(path) for path in options.compare]
        models = [(recipe.name, recipe, method) for recipe, method, _ in ((recipe, method, checkpoint), *others)]
        compare_files(models, options.images, options.out, options.seed)
    else:
        reconstruct_files(recipe, method, options.images, options.out, options.seed, title=str(checkpoint))
    print(f"{checkpoint} -> {options.out}")


def _replay(options: argparse.Namespace) -> None:
    from ummim.replay import replay
    from ummim.rerun import is_bundle, rerun

    if is_bundle(options.folder):
        for line in rerun(options.folder):
            print(line)
        return
    if options.step is None:
        raise UserError(f"{options.folder}: is no bad step's folder, and of a run's --step N tells which to replay")
    found = replay(options.folder, options.step, options.shards)
    for line in found.lines():
        print(line)
    if options.out is not None:
        found.draw(options.out)
    if options.save is not None:
        found.save(options.save)


if __name__ == "__main__":
    sys.exit(main())
