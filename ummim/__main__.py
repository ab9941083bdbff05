"""Command line: ``ummim recipes``, ``rehearse``, ``show``, ``cost``, ``capacity``, ``export``, ``verify-export``,
``reconstruct``, ``replay``, ``report``, ``preflight``, ``status``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ummim.capacity.options import add_options as add_capacity_options
from ummim.errors import UserError, run_main
from ummim.recipe_list import add_options as add_recipes_options
from ummim.rehearsal.options import add_options as add_rehearse_options
from ummim.report.options import add_options as add_report_options


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 a check that failed, 2 the user's mistake, 130 Ctrl-C,
    141 its output's reader has gone."""
    options = _parser().parse_args(argv)
    try:
        return run_main(lambda: options.run(options))
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ummim", description="Masked image modelling pre-training.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_recipes(commands)

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

    _add_export(commands)

    reconstruct = commands.add_parser("reconstruct", help="draw what a checkpoint makes of images")
    reconstruct.add_argument("checkpoint", type=Path, help="a run's folder, or one of its checkpoints/step-N")
    reconstruct.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    reconstruct.add_argument("--out", type=Path, required=True, metavar="PNG")
    reconstruct.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="CHECKPOINT", help="other checkpoints, drawn beside it"
    )
    reconstruct.add_argument("--seed", type=int, default=0, help="of the masks (default 0)")
    reconstruct.set_defaults(run=_reconstruct)

    replay = commands.add_parser("replay", help="read a step's batch again: its sample keys, crops, masks or labels")
    replay.add_argument("folder", type=Path, metavar="RUN", help="a run's folder, or a step-N of its bad_steps")
    replay.add_argument("--step", type=int, metavar="N", help="as in metrics.jsonl; the first is 1")
    replay.add_argument("--out", type=Path, metavar="PNG", help="draw the crops, masked or mixed")
    replay.add_argument("--save", type=Path, metavar="FILE.safetensors", help="write images, masks, labels and keys")
    replay.add_argument("--shards", metavar="FOLDER", help="where the run's shards are now, if they have moved")
    replay.set_defaults(run=_replay)

    report = commands.add_parser("report", help="write a page of HTML on runs: curves, pictures, faults, differences")
    add_report_options(report)

    from ummim.cluster.commands import add_commands
    from ummim.downstream.commands import add_commands as add_downstream_commands
    from ummim.downstream.evaluate_command import add_evaluate

    add_commands(commands)
    add_evaluate(commands)
    add_downstream_commands(commands)
    return parser


def _add_recipes(commands: Any) -> None:
    """The subcommands ``recipes`` and ``rehearse``."""
    recipes = commands.add_parser("recipes", help="list the packaged recipes, with published accuracy and cost")
    add_recipes_options(recipes)
    recipes.set_defaults(run=_recipes)
    rehearse = commands.add_parser("rehearse", help="take a recipe, shrunk, from shards to a classifier, on a laptop")
    add_rehearse_options(rehearse)
    rehearse.set_defaults(run=_rehearse)


def _add_export(commands: Any) -> None:
    """The subcommands ``export`` and ``verify-export``."""
    export = commands.add_parser("export", help="write a checkpoint's weights for other programs")
    export.add_argument(
        "checkpoint", type=Path, help="a run's folder (of a fine-tuning too), or one of its checkpoints/step-N"
    )
    export.add_argument("out", type=Path, help="the file to write; for huggingface, the folder")
    export.add_argument(
        "--format",
        choices=("safetensors", "timm", "official", "huggingface"),
        default="safetensors",
        help="safetensors: the encoder (a ViT's loads strictly in timm); timm: the same, refused for encoders that "
        "timm does not have; official: the whole model under the paper code's names, as a .pth; huggingface: a folder "
        "for transformers' from_pretrained",
    )
    export.add_argument(
        "--model",
        choices=("auto", "encoder"),
        default="auto",
        help="huggingface: with the decoder where transformers has such a class (auto, the default), or the encoder",
    )
    export.set_defaults(run=_export)

    verify = commands.add_parser("verify-export", help="check an export's files and numbers against its certificate")
    verify.add_argument("exported", type=Path, help="the file or folder that ummim export wrote")
    verify.set_defaults(run=_verify_export)


# Each command imports what it needs, so that --help and a mistyped option answer at once.


def _recipes(options: argparse.Namespace) -> None:
    from ummim.recipe_list import run

    print(run(options))


def _rehearse(options: argparse.Namespace) -> int:
    from ummim.rehearsal.command import run

    return run(options)


def _show(options: argparse.Namespace) -> None:
    from ummim.recipe_file import dump_recipe, load_recipe
    from ummim.run_config import RunConfig

    print(dump_recipe(load_recipe(options.recipe, options.overrides, RunConfig)), end="")


def _cost(options: argparse.Namespace) -> None:
    import json

    from ummim.cost import report, table
    from ummim.recipe_file import load_recipe

    values = report(load_recipe(options.recipe, options.overrides))
    print(json.dumps(values, indent=2) if options.json else table(values))


def _capacity(options: argparse.Namespace) -> None:
    from ummim.capacity.options import run

    print(run(options))


def _export(options: argparse.Namespace) -> int:
    from ummim.downstream.trained import load_any
    from ummim.interop.check import ExportFailed
    from ummim.interop.export import export

    recipe, model, checkpoint = load_any(options.checkpoint)
    try:
        path, line = export(recipe, model, checkpoint, options.out, options.format, options.model == "encoder")
    except ExportFailed as failure:
        print(f"ummim: error: {failure}", file=sys.stderr)
        return 1
    print(f"{checkpoint} -> {path}\n{line}")
    return 0


def _verify_export(options: argparse.Namespace) -> int:
    from ummim.interop.certificate import verify

    holds, lines = verify(options.exported)
    for line in lines:
        print(line)
    print(f"{options.exported}: {'holds' if holds else 'does NOT hold'} what its certificate states")
    return 0 if holds else 1


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
