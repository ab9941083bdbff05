"""Where images come from. What SRC is, is seen from the files; each module reads one kind."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.locations import check_parts, exists, glob, is_folder, open_seekable, walk
from data_prep.locations import read as read_file
from data_prep.sources import annotated, idx, imagenet, manifest, parquet, shards
from data_prep.sources.folder import SUFFIXES, folder_source, is_image
from data_prep.sources.item import Item, Source, make_key, subset
from data_prep.tar import sound_members
from ummim.data.shards import INDEX
from ummim.data.urls import basename, join, local_path, parent
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
        DataError: ``src`` is missing, holds no images, or holds several kinds of them.
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
    if exists(join(src, INDEX)):
        return shards.indexed_source(src, reading.unlabelled)
    files = walk(src)
    top = [name for name, _ in files if "/" not in name]
    images_idx = [name for name in top if idx.IDX_IMAGES.search(name)]
    if images_idx:
        train = [name for name in images_idx if name.startswith("train")]
        if len(train or images_idx) > 1:
            raise DataError(f"{src} holds several IDX files ({', '.join(images_idx)}): give one of them as SRC")
        return idx.idx_source(join(src, (train or images_idx)[0]))
    images = [(name, size) for name, size in files if is_image(name)]
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
        return folder_source(src, images, reading.unlabelled)
    lists = [name for name in top if name.endswith((*manifest.SUFFIXES, annotated.SUFFIX))]
    if lists:
        raise DataError(f"{src} holds no images, but {lists[0]}: give it as SRC to build from its list")
    found = f"its {total} files are none of {', '.join(sorted(SUFFIXES))}, .tar, .parquet" if total else "it is empty"
    raise DataError(f"{src} holds no images: {found}")


def _files(src: str, files: list[tuple[str, str]], reading: Reading, workers: int) -> Source:
    """``files`` (location, name) of one kind."""
    path, name = files[0]
    if all(name.endswith(".parquet") for _, name in files):
        return parquet.parquet_source(files, reading.image_column, reading.label_column, reading.unlabelled)
    if all(name.endswith(".tar") for _, name in files):
        return _tars(src, [path for path, _ in files], reading, workers)
    if all(is_image(name) for _, name in files) and len(files) > 1:
        return folder_source(parent(path), [(basename(path), 0) for path, _ in files], unlabelled=True)
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
