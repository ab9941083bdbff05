"""The command line of ``build``."""

import argparse
import os
import re
from pathlib import Path

from data_prep.arguments import count
from ummim.errors import DataError


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``build`` to the commands of ``python -m data_prep``."""
    build = commands.add_parser("build", help="make shards from images")
    build.add_argument("src", help="folder of images (a folder per class, or flat), ImageNet's tars, iNaturalist's "
                       "JSON, shards, CSV or JSONL manifest, Parquet or IDX files; path, URL or pattern")  # fmt: skip
    build.add_argument("dst", help="folder or URL for the shards; an interrupted build goes on where it was")
    _add_shards(build.add_argument_group("shards"))
    _add_images(build.add_argument_group("images"))
    _add_source(build.add_argument_group("reading SRC"))
    cores = len(os.sched_getaffinity(0))
    build.add_argument("--workers", type=int, default=cores, metavar="N", help="processes (%(default)s)")
    build.add_argument("--overwrite", action="store_true", help="replace the shards that lie in DST")
    build.add_argument("--staging", type=Path, metavar="DIR",
                       help="folder for shards on their way to a URL, and for the journal")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Run ``build``; returns the exit code."""
    from data_prep.build import BuildOptions, build  # here, so that --help and a mistyped option answer at once

    fields = {name: getattr(options, name) for name in BuildOptions.__dataclass_fields__}
    fields["classes"] = None if options.classes is None else _classes(options.classes)
    print(build(options.src, options.dst, BuildOptions(**fields), options.workers, options.overwrite, options.staging))
    return 0


def _add_shards(group: argparse._ArgumentGroup) -> None:
    option = group.add_argument
    option("--shard-count", type=count, default=1000, metavar="N", help="images per shard (%(default)s)")
    option("--shard-bytes", type=_size, metavar="SIZE", help="close a shard once it has SIZE bytes, e.g. 256MB")
    option("--shuffle-seed", type=int, default=0, metavar="S", help="seed of the samples' order (%(default)s)")
    option("--no-shuffle", dest="shuffle_seed", action="store_const", const=None, help="keep the order of SRC instead")
    option("--limit", type=count, metavar="N", help="take only N images, the first ones after shuffling")


def _add_images(group: argparse._ArgumentGroup) -> None:
    option = group.add_argument
    option("--classes", metavar="FILE|A,B,...", help="take only these classes, numbered in this order")
    option("--short-side", type=count, metavar="PX", help="shrink larger images to this short side")
    option("--quality", type=_quality, metavar="Q",
           help="make every image a JPEG of quality Q (keep the file's bytes; shrunk images get 95)")  # fmt: skip
    option("--exif", choices=["keep", "bake", "drop"], default="keep",
           help="rotation by EXIF: keep it in the file's bytes, for the loader to apply; bake it into the pixels; or "
           "drop it, as torchvision's ImageFolder does (%(default)s)")  # fmt: skip
    option("--min-side", type=count, default=1, metavar="PX", help="leave out images with a smaller side (%(default)s)")
    option("--max-pixels", type=count, default=178_956_970, metavar="N",
           help="leave out images with more pixels (%(default)s)")  # fmt: skip
    option("--max-bad", type=_share, default=0.01, metavar="SHARE",
           help="share of images that may be left out before the build fails (%(default)s)")  # fmt: skip


def _add_source(group: argparse._ArgumentGroup) -> None:
    option = group.add_argument
    option("--unlabelled", action="store_true", help="take all images at any depth, without labels")
    option("--root", metavar="DIR", help="folder that a manifest's or annotations' paths are relative to (the file's)")
    option("--devkit", metavar="PATH", help="ImageNet's devkit, for the validation labels (the one beside the tar)")
    option("--image-column", metavar="NAME", help="of Parquet files (found by its type and name)")
    option("--label-column", metavar="NAME", help="of Parquet files (found by its type and name)")


def _classes(text: str) -> tuple[str, ...]:
    path = Path(text)
    try:
        names = path.read_text("utf-8").splitlines() if path.is_file() else text.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--classes {path} cannot be read: {error}") from None
    found = tuple(name.strip() for name in names if name.strip())
    if not found:
        raise DataError(f"--classes {text!r}: name at least one class")
    return found


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
