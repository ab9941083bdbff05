"""``ummim recipes``: the catalogue as a table to read, as Markdown or as JSON. Imports nothing that takes time."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ummim.errors import UserError

if TYPE_CHECKING:
    from ummim.capacity.report import Cluster
    from ummim.catalogue import Entry

NOTES = """\
r: PR-MIM's throwing ratio. top-1: accuracy on ImageNet-1K that was published for the recipe; of a pre-training, after
fine-tuning. status: planned; rehearsed: `ummim rehearse` took its shrunk form from shards to a classifier; reproduced:
we reached the published accuracy. None was trained by us at full length. G-MAC: multiply-adds of a forward pass for
one image, as `ummim cost` counts them, of an evaluation those of the classifier on whole images; of full: beside
throwing nothing."""
CLUSTER_NOTES = """\
days and GPU hours on {nodes} x {per_node} {gpu}, failures and checkpoints included, at an assumed {efficiency:.0%} of
the GPUs' peak: see `ummim capacity`, which also says whether a recipe fits and what else is assumed. Of an evaluation:
its training alone, the backward pass counted as far down as something is trained (full: three forward passes' worth;
linear, attentive: little more than one), of knn one forward pass of ImageNet-1K's training and validation images."""


class Column(NamedTuple):
    """A column of a table."""

    title: str
    cell: Callable[["Entry"], str]
    number: bool = False


def _ratio(entry: "Entry") -> str:
    return f"{entry.throw_ratio:.0%}" if entry.throw_ratio else ""


def _top1(entry: "Entry") -> str:
    return "" if entry.top1 is None else f"{entry.top1:.2f}".removesuffix("0")


def _of_full(entry: "Entry") -> str:
    return f"{entry.of_full:.0%}" if entry.of_full is not None and round(entry.of_full, 2) != 1 else ""


def _status(entry: "Entry") -> str:
    if not entry.seen:
        return entry.status
    commit, plus, _ = entry.seen["commit"].partition("+")  # +changes: of a checkout with uncommitted ones
    return f"{entry.status} {entry.seen['date']} ({entry.seen['version']}, {commit[:8]}{plus})"


NAME = Column("recipe", lambda entry: entry.recipe)
BACKBONE = Column("backbone", lambda entry: entry.backbone)
EPOCHS = Column("epochs", lambda entry: str(entry.epochs), True)
TOP1 = Column("top-1", _top1, True)
SOURCE = Column("published by", lambda entry: entry.source)
GMAC = Column("G-MAC", lambda entry: f"{entry.forward_gmac:.2f}", True)
PRE_TRAINING = (
    NAME,
    Column("method", lambda entry: entry.method),
    BACKBONE,
    EPOCHS,
    Column("r", _ratio, True),
    TOP1,
    SOURCE,
    Column("status", _status),
    GMAC,
    Column("of full", _of_full, True),
)
COST = (
    Column("days", lambda entry: "" if entry.days is None else f"{entry.days:.2f}", True),
    Column("GPU hours", lambda entry: "" if entry.gpu_hours is None else f"{entry.gpu_hours:,.0f}", True),
)
FINE_TUNED_BY = Column("fine-tuned by", lambda entry: entry.finetune)
EVALUATION = (
    NAME,
    Column("protocol", lambda entry: entry.method),
    BACKBONE,
    EPOCHS,
    TOP1,
    SOURCE,
    Column("status", _status),
    GMAC,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``ummim recipes``."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a JSON array; ummim/catalogue.py explains its keys")
    form.add_argument("--markdown", action="store_true", help="docs/recipes.md")
    parser.add_argument("--gpu", metavar="NAME", help="add days and GPU hours on this GPU, such as H100")
    parser.add_argument("--nodes", type=int, metavar="N", help="of the cluster; default 1")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="default 8")


def run(options: argparse.Namespace) -> str:
    """What the options ask for. Raises UserError for a cluster that cannot be."""
    from ummim.catalogue import as_json, catalogue

    cluster = _cluster(options)
    entries = catalogue(cluster)
    if options.json:
        return as_json(entries)
    return markdown(entries, cluster) if options.markdown else text(entries, cluster)


def _cluster(options: argparse.Namespace) -> "Cluster | None":
    if options.gpu is None:
        if options.nodes is not None or options.gpus_per_node is not None:
            raise UserError("--nodes, --gpus-per-node: name the GPU too, such as --gpu H100")
        return None
    from ummim.capacity.gpus import Assumptions, find_gpu
    from ummim.capacity.report import Cluster

    nodes = 1 if options.nodes is None else options.nodes
    per_node = 8 if options.gpus_per_node is None else options.gpus_per_node
    if nodes < 1 or per_node < 1:
        raise UserError("--nodes and --gpus-per-node: give at least 1")
    return Cluster(nodes, per_node, find_gpu(options.gpu, None, None, None), Assumptions())


def text(entries: Sequence["Entry"], cluster: "Cluster | None" = None) -> str:
    """Two tables for a terminal, and what their columns mean."""
    parts = []
    for title, columns, rows in _tables(entries, cluster):
        cells = [[column.title for column in columns], *([column.cell(row) for column in columns] for row in rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        lines = [
            "  ".join(
                f"{cell:{'>' if column.number else '<'}{width}}"
                for cell, column, width in zip(line, columns, widths, strict=True)
            ).rstrip()
            for line in cells
        ]
        parts.append("\n".join([f"{title} ({len(rows)})", *lines]))
    return "\n\n".join([*parts, "\n".join([NOTES, *_about(entries, cluster)])])


def markdown(entries: Sequence["Entry"], cluster: "Cluster | None" = None) -> str:
    """The page ``docs/recipes.md``."""
    parts = [HEAD]
    for title, columns, rows in _tables(entries, cluster):
        lines = [
            _row(column.title for column in columns),
            _row("---:" if column.number else "---" for column in columns),
            *(_row(_marked(column, row) for column in columns) for row in rows),
        ]
        parts.append("\n".join([f"## {title}", "", *lines]))
        if columns[: len(EVALUATION)] != EVALUATION:
            parts.append("\n".join([NOTES, *_about(entries, cluster)]))
    return "\n\n".join([*parts, REHEARSAL])


def _tables(
    entries: Sequence["Entry"], cluster: "Cluster | None"
) -> list[tuple[str, tuple[Column, ...], list["Entry"]]]:
    first = (*PRE_TRAINING, *(COST if cluster else ()), FINE_TUNED_BY)
    tables = [("Pre-trainings", first, [entry for entry in entries if not entry.evaluation])]
    evaluations = [entry for entry in entries if entry.evaluation]
    second = (*EVALUATION, *(COST if cluster else ()))
    return [*tables, ("Evaluations", second, evaluations)] if evaluations else tables


def _about(entries: Sequence["Entry"], cluster: "Cluster | None") -> list[str]:
    if cluster is None:
        return []
    names = {"nodes": cluster.nodes, "per_node": cluster.per_node, "gpu": cluster.gpu.name}
    refused = [f"{entry.recipe}: {entry.refused}" for entry in entries if entry.refused]
    return [CLUSTER_NOTES.format(**names, efficiency=cluster.assumed.efficiency), *refused]


def _marked(column: Column, entry: "Entry") -> str:
    cell = column.cell(entry)
    return f"`{cell}`" if cell and column in (NAME, FINE_TUNED_BY) else cell


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


HEAD = """\
# Recipes

<!-- written by `ummim recipes --markdown > docs/recipes.md` -->

The packaged recipes: `python train.py RECIPE` runs one, `ummim show RECIPE` prints it in full, and a comment at its
head names the source of its numbers. `ummim recipes` prints these tables, with `--gpu H100 --nodes 16` also the days
and GPU hours on that cluster, with `--json` for programs. [`methods.md`](methods.md) says what the methods are."""
REHEARSAL = """\
## Rehearsing a recipe

`ummim rehearse RECIPE` takes a recipe, shrunk, through everything that it will go through on a cluster, before GPUs
are rented: in about two minutes on two CPU cores, without a GPU or a network. It needs a clone of the repository, for
it runs `train.py`. Its first lines say what is kept (method, kind of encoder, mask, partial reconstruction, ZeRO stage,
precision, activation checkpointing, schedule and peak learning rate) and every key that is changed. Then, a line for
each stage:

- **data**: the packaged photographs become shards, by `python -m data_prep build`;
- **undisturbed**: 12 steps on two ranks, through DeepSpeed with the recipe's ZeRO stage;
- **killed**: the same with `kill -9` to a rank after its first checkpoint; the other rank ends by itself;
- **resumed**: on one rank, from the checkpoint to the end; every step's loss is compared with the undisturbed run's:
  equal up to the kill, then within 1e-5 in fp32 and 1e-2 in bf16, whose roundings grow from step to step;
- **export** and **load again**: every format that the model has (for the others, why not), read back and compared;
- **fine-tuning**: two steps of the evaluation that the recipe names as `finetune` (or `--finetune RECIPE`) on the
  exported encoder, shrunk as well, and its accuracy on 27 photographs, which means nothing.

A failure tells the stage, the command, the end of its log and where all files are; the exit code is 2 where a command
found the recipe at fault and 1 otherwise. `--keep FOLDER` keeps the files. `key=value` after the recipe is applied
before it is shrunk. An evaluation is rehearsed in the same way, on a small fresh encoder. What it does not show: that a
recipe fits a GPU, how fast it is, or what it reaches."""
