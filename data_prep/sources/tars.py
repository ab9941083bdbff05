"""Where the members of a tar lie, so that they can be read one by one without unpacking."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from ummim.errors import DataError

_END = 1024  # a tar ends with two zero blocks


class Member(NamedTuple):
    """A regular file in a tar: its data are ``size`` bytes from ``offset``."""

    name: str
    offset: int
    size: int


def members(file: BinaryIO, where: str, start: int = 0, length: int | None = None) -> Iterator[Member]:
    """The members of the tar that begins at ``start`` of ``file``, in its order; ``where`` names it in messages.

    ``length`` is the tar's own, if it lies inside another one.

    Raises:
        DataError: no plain tar, one that is cut short or damaged, or a member that lies in pieces.
    """
    end = file.seek(0, 2) if length is None else start + length
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps all it has seen
                if info.offset_data + info.size > end:
                    raise tarfile.ReadError(f"member {info.name!r} should end at byte {info.offset_data + info.size}")
                if info.sparse is not None:
                    raise tarfile.ReadError(f"member {info.name!r} is a sparse file")
                if info.isfile():
                    yield Member(info.name, info.offset_data, info.size)
            last = tar.offset
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{where} is truncated at byte {end}, or no plain tar ({error}): restore it") from None
    file.seek(last)
    tail = file.read(min(_END, end - last))
    if tail != bytes(_END):
        fault = f"damaged at byte {last}" if tail.strip(b"\0") else f"truncated at byte {end}"
        raise DataError(f"{where} is {fault}: there is no end-of-archive mark after its last member: restore it")


def padded(size: int) -> int:
    """Bytes that a file of ``size`` takes in a tar: a header, and its data up to a whole block."""
    return tarfile.BLOCKSIZE + size + -size % tarfile.BLOCKSIZE
