"""Where images come from. What SRC is, is seen from the files; each module reads one kind."""

import sys
from dataclasses import dataclass
from pathlib import Path

from data_prep.locations import check_parts, exists, glob, is_folder, open_seekable, walk
from data_prep.locations import read as read_file
from data_prep.sources import annotated, idx, imagenet, manifest, parquet, shards
from data_prep.sources.folder import SUFFIXES, folder_source, is_image, is_litter, listed_source, suffixes
from data_prep.sources.item import Item, Source, make_key, subset
from data_prep.tar import sound_members
from ummim.data.shards import INDEX, JOURNAL
from ummim.data.urls import basename, join, local_path, parent, shown
from ummim.errors import DataError

__all__ = ["Item", "Reading", "Source", "make_key", "open_source", "read_item", "subset"]

_IMAGENET_TARS = 3  # train, val and test


@dataclass(frozen=True)
class Reading:
    """How a source is to be read, where its files do not tell.

    Attributes:
        unlabelled: take all images at any depth, without labels.
        root: folder that a manifest's or annotations' paths are relative to; its own, if not given.
        devkit: ImageNet's devkit, a folder or ``.tar.gz``; the one beside the tar, if not given.
        image_column, label_column: of Parquet files; found by type and name, if not given.
    """

    unlabelled: bool = False
    root: str | None = None
    devkit: str | None = None
    image_column: str | None = None
    label_column: str | None = None


def open_source(src: str | Path, reading: Reading | None = None, workers: int = 1) -> Source:
    """List the images of ``src``: a file, a folder, a pattern like ``data/train-*.parquet``, each by path or URL.

    Raises:
        DataError: ``src`` is missing, holds no images, several kinds of them or an unfinished build, or is no Parquet,
            whose columns ``reading`` names.
    """
    reading = reading or Reading()
    src = local_path(str(src))
    if not is_folder(src) and any(mark in src for mark in "*?[") and not exists(src):
        files = [(path, basename(path)) for path in glob(src)]
        if not files:
            raise DataError(f"{src}: no file fits this pattern")
        return _files(src, files, reading, workers)
    if not exists(src):
        raise DataError(f"{src} does not exist: give a folder of images or shards, a tar, a manifest, "
                        "iNaturalist's annotations, or a Parquet or IDX file")  # fmt: skip
    if not is_folder(src):
        return _files(src, [(src, basename(src))], reading, workers)
    return _folder(src, reading, workers)


def read_item(item: Item) -> bytes:
    """The bytes of an image's file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no image.
        DataError: its server does not answer, or the source has changed since it was listed.
    """
    if item.kind == "file":
        return read_file(item.path)
    if item.kind == "range":
        return read_file(item.path, item.position, item.size)
    if item.kind == "idx":
        return idx.read_image(item.path, item.position)
    if item.kind == "parquet":
        return parquet.read_image(item.path, item.position)
    raise ValueError("the sample has no image")


def _folder(src: str, reading: Reading, workers: int) -> Source:
    shards.check_finished(src)
    if exists(join(src, INDEX)):
        _refuse_columns(src, reading)
        return shards.indexed_source(src, reading.unlabelled)
    files, built = _walk(src)
    top = [name for name, _ in files if "/" not in name]
    if JOURNAL in top:
        raise shards.unfinished(src)
    images_idx = [name for name in top if idx.IDX_IMAGES.search(name)]
    if images_idx:
        train = [name for name in images_idx if name.startswith("train")]
        if len(train or images_idx) > 1:
            raise DataError(f"{src} holds several IDX files ({', '.join(images_idx)}): give one of them as SRC")
        _refuse_columns(src, reading)
        return idx.idx_source(join(src, (train or images_idx)[0]))
    images: list[tuple[str, int]] = []
    others: list[str] = []
    for entry in files:
        if is_image(entry[0]):
            images.append(entry)
        elif not is_litter(entry[0]):
            others.append(entry[0])
    tars = [name for name in top if name.endswith(".tar")]
    tables = [name for name, _ in files if name.endswith(".parquet")]
    kinds = [names[0] for names in ([name for name, _ in images], tars, tables) if names]
    if len(kinds) > 1:
        raise DataError(f"{src} holds images of several kinds ({', '.join(kinds)}): give a folder of one kind, a file, "
                        "or a pattern such as '.../*.tar' as SRC")  # fmt: skip
    if tars or tables:
        return _files(src, [(join(src, name), name) for name in tars or tables], reading, workers)
    total = len(files)
    del files  # folder_source empties ``images`` as it goes
    if images:
        _refuse_columns(src, reading)
        source = folder_source(src, images, reading.unlabelled, others)
        _tell(src, built, others)
        return source
    lists = [name for name in top if name.endswith((*manifest.SUFFIXES, annotated.SUFFIX))]
    if lists:
        raise DataError(f"{src} holds no images, but {lists[0]}: give it as SRC to build from its list")
    if built:
        raise DataError(f"{src} holds no images itself, but shards in {built[0]}: give {join(src, built[0])} as SRC")
    found = f"its {total} files are none of {', '.join(sorted(SUFFIXES))}, .tar, .parquet" if total else "it is empty"
    raise DataError(f"{src} holds no images: {found}")


def _walk(src: str) -> tuple[list[tuple[str, int]], list[str]]:
    """The files of ``src`` (path below it, bytes) but for those of folders of shards, and these folders."""
    files = walk(src)
    built = shards.shard_folders([name for name, _ in files])
    if built:
        inside = tuple(f"{folder}/" for folder in built)
        files = [(name, size) for name, size in files if not name.startswith(inside)]
    return files, built


def _tell(src: str, built: list[str], others: list[str]) -> None:
    """Say what of a folder of images is left out."""
    if built:
        print(f"{shown(src)}: {', '.join(built)} left out: shards, no images", file=sys.stderr)
    if others:
        noun = "file" if len(others) == 1 else "files"
        print(f"{shown(src)}: {len(others):,} other {noun} left out ({suffixes(others)})", file=sys.stderr)


def _refuse_columns(src: str, reading: Reading) -> None:
    """Raise DataError if columns are named, which only Parquet files have."""
    for option, value in (("--image-column", reading.image_column), ("--label-column", reading.label_column)):
        if value is not None:
            raise DataError(f"{option} {value}: {shown(src)} is no Parquet, whose column this names: leave it out")


def _files(src: str, files: list[tuple[str, str]], reading: Reading, workers: int) -> Source:
    """``files`` (location, name) of one kind."""
    path, name = files[0]
    if all(name.endswith(".parquet") for _, name in files):
        return parquet.parquet_source(files, reading.image_column, reading.label_column, reading.unlabelled)
    _refuse_columns(src, reading)
    if all(name.endswith(".tar") for _, name in files):
        return _tars(src, [path for path, _ in files], reading, workers)
    if all(is_image(name) for _, name in files) and len(files) > 1:
        return listed_source([path for path, _ in files])
    if len(files) > 1:
        raise DataError(f"{src}: {name} and {files[-1][1]} are not tars, Parquet files or images alike")
    if name.endswith(manifest.SUFFIXES):
        return manifest.manifest_source(path, reading.root, reading.unlabelled)
    if name.endswith(annotated.SUFFIX):
        return annotated.annotated_source(path, reading.root, reading.unlabelled)
    if name.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip")):
        raise DataError(f"{path} is compressed, which has no random access: unpack it first")
    if is_image(name):
        raise DataError(f"{path} is a single image: give the folder that holds it")
    return idx.idx_source(path)


def _tars(src: str, paths: list[str], reading: Reading, workers: int) -> Source:
    for folder in dict.fromkeys(map(parent, paths)):
        shards.check_finished(folder)
    check_parts(paths[0])
    for path in paths[:_IMAGENET_TARS]:
        with open_seekable(path) as file:
            first = next(sound_members(file, path), None)
        special = first is not None and (first.name.endswith(".tar") or imagenet.VALIDATION.fullmatch(first.name))
        if special and len(paths) > 1:
            raise DataError(f"{src} holds ImageNet's tars ({', '.join(map(basename, paths))}): give one of them as SRC")
        if first is not None and first.name.endswith(".tar"):
            return imagenet.train_source(path, reading.unlabelled, workers)
        if special:
            return imagenet.validation_source(path, reading.devkit, reading.unlabelled)
    source = shards.tar_source(paths, reading.unlabelled, workers)
    if not source.items:
        raise DataError(f"{src} holds no samples")
    return source
