"""Remote files as local ones, for as long as they are in use."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import IO

from data_prep.locations import patience
from ummim.data.download import persist
from ummim.data.remote import Refused, stream
from ummim.data.shards import CLASSES, INDEX, TABLE
from ummim.data.urls import is_url, join


@contextmanager
def local_file(location: str) -> Iterator[Path]:
    """A file by its path; of a URL, a copy in the folder for temporary files.

    Raises:
        Refused: the server has no such file.
        DataError: it cannot be reached for a minute.
    """
    if not is_url(location):
        yield Path(location)
        return
    with NamedTemporaryFile(prefix="ummim-") as file:
        _fetch(location, file)
        file.flush()
        yield Path(file.name)


@contextmanager
def local_index(place: str) -> Iterator[Path]:
    """A folder with index, table and class list, as far as they are there: ``place`` itself, or a copy of them."""
    if not is_url(place):
        yield Path(place)
        return
    with TemporaryDirectory(prefix="ummim-") as folder:
        for name in (INDEX, TABLE, CLASSES):
            copy = Path(folder) / name
            try:
                with copy.open("wb") as file:
                    _fetch(join(place, name), file)
            except Refused:
                copy.unlink()
        yield Path(folder)


def _fetch(location: str, file: IO[bytes]) -> None:
    limit = patience()

    def receive() -> None:
        for piece in stream(location, file.tell(), None, limit.stall):  # goes on where it broke off
            file.write(piece)
            limit.progress()

    persist(receive, location, limit)
