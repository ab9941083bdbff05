"""Where ``index`` finds shards, and where their index goes: a folder, the URL of one, or a folder for a URL's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from data_prep.locations import read, walk
from data_prep.target import Target
from ummim.data.shards import CLASSES, JOURNAL
from ummim.data.urls import basename, is_url, is_web, join, shown
from ummim.errors import DataError


@contextmanager
def indexed_place(place: str, out: Path | None) -> Iterator[Target]:
    """The target of the index of the shards in ``place``, a path or URL; class names lie in its folder.

    What is bound for a URL is written into a temporary folder first. A URL that takes no files is refused now, not
    after hours of reading shards.

    Raises:
        DataError: nothing can be written there, ``out`` holds shards, or another class list.
    """
    if not is_url(place):
        if out is not None:
            raise DataError(f"--out is for shards behind a URL: the index of {place} is written beside them")
        yield Target(Path(place), None)
        return
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        if _tars(out, "*.tar"):
            raise DataError(f"--out {out} holds shards, which have an index of their own: name another folder")
        _fetch_classes(place, out)
        yield Target(out, None)
        return
    if is_web(place):
        raise DataError(f"{shown(place)}: nothing can be written over http: name a folder for the index with --out")
    with TemporaryDirectory(prefix="ummim-") as folder:
        target = Target(Path(folder), place)
        try:
            target.check_writable()
        except (OSError, DataError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"{place} takes no files ({reason}): name a folder for the index with --out") from None
        _fetch_classes(place, target.folder)
        yield target


def shard_names(place: str, recursive: bool) -> list[str]:
    """Paths below ``place`` of its tars, sorted.

    Raises:
        DataError: there are none, or the folder holds an unfinished build.
    """
    if is_url(place):
        names = [name for name, _ in walk(place, deep=recursive)]
        tars = [name for name in names if name.endswith(".tar")]
        if tars:
            return tars
        nested = []
    else:
        folder = Path(place)
        if not folder.is_dir():
            raise DataError(f"{place} is no folder of shards")
        if (folder / JOURNAL).exists():
            raise DataError(f"{place} holds an unfinished build: run the same build again, it goes on where it was")
        tars = _tars(folder, "**/*.tar" if recursive else "*.tar")
        if tars:
            return tars
        nested, names = _tars(folder, "**/*.tar"), [path.name for path in folder.iterdir()]
    if nested:
        raise DataError(
            f"{place} holds no shards itself, but {len(nested)} in folders below ({nested[0]}): "
            "index one of these, or all of them as one data set: --recursive"
        )
    packed = next((name for name in sorted(names) if ".tar." in name), None)
    found = f", but {basename(packed)}: unpack compressed tars first, they have no random access" if packed else ""
    raise DataError(f"{shown(place)} holds no shards (*.tar){found}")


def _tars(folder: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern) if not path.is_dir())


def _fetch_classes(place: str, folder: Path) -> None:
    """Copy the class list beside the shards, if there is one, into ``folder``."""
    own = folder / CLASSES
    try:
        names = read(join(place, CLASSES))
    except FileNotFoundError:
        return
    if own.exists() and own.read_bytes() != names:
        raise DataError(f"{own} is not the class list of {shown(place)}: remove it, or name another folder")
    own.write_bytes(names)
