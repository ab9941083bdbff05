"""Reads the members of plain tars, also of tars within tars; damaged ones as far as they can be read."""

import re
import tarfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from ummim.errors import DataError

_BLOCK = 512
_MARK = 2 * _BLOCK  # a tar ends with two zero blocks
_PIECE = 2**20  # bytes that are searched at a time
_MAGIC, _MAGIC_AT = b"ustar", 257  # of POSIX, GNU and PAX headers
_META = re.compile(r"__[^/.]*__($|[/.])")  # WebDataset's notes about a shard
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Fault:
    """Something wrong with a folder of shards.

    Attributes:
        file: the shard (by its path below the folder), or another file of the folder.
        kind: index, shard, tar, key, member, label or image.
        reason: what is wrong.
        key: of the sample, if it is one sample's.
        byte: offset in the file, where there is one to name.
    """

    file: str
    kind: str
    reason: str
    key: str | None = None
    byte: int | None = None

    def __str__(self) -> str:
        key = "" if self.key is None else f"key {self.key!r} "
        byte = "" if self.byte is None else f"at byte {self.byte}"
        place = f": {key}{byte}".rstrip() if key or byte else ""
        return f"{self.file}{place}: {self.reason}"


@dataclass(frozen=True)
class Member:
    """A file in a tar. ``header`` and ``offset``: bytes of the file at which its header and its data begin."""

    name: str
    header: int
    offset: int
    size: int
    is_plain: bool  # stored as one piece; no link or sparse file
    is_sparse: bool = False
    target: str = ""  # of a hard link: the member whose data it shares


def members(file: BinaryIO, shard: str, start: int = 0, length: int | None = None) -> Iterator[Member | Fault]:
    """Files in the order of the tar, without WebDataset's ``__notes__``, and a fault wherever it is damaged.

    Python's ``tarfile`` takes a tar that stops between two members, or goes on with rubbish, for a whole one.
    After rubbish, this goes on at the next header, if there is one.

    Args:
        file: open for reading, seekable.
        shard: its name in faults.
        start, length: the tar's place in ``file`` in bytes, if it lies inside another one.
    """
    size = file.seek(0, 2) if length is None else start + length
    begin: int | None = start
    while begin is not None:
        end = yield from _run(file, begin, size, shard)
        if end is None:
            return
        begin = _next_header(file, end, size)
        reason = _end_fault(file, min(end, size), start, size, more=begin is not None)
        if reason:
            yield Fault(shard, "tar", reason, byte=min(end, size))


def sound_members(
    file: BinaryIO, where: str, start: int = 0, length: int | None = None, left_out: list[str] | None = None
) -> Iterator[Member]:
    """The files of a tar without a fault; like ``members``. A hard link is a file with its target's data.

    Args:
        file, where, start, length: as those of ``members``.
        left_out: takes the names of members that are no files, such as symbolic links.

    Raises:
        DataError: no plain tar, one that is cut short or damaged, a member that lies in pieces, or a hard link whose
            target does not stand before it.
    """
    seen: dict[str, Member | None] = {}  # None: no file
    for member in members(file, where, start, length):
        if isinstance(member, Fault):
            raise DataError(f"{member}: restore it")
        if member.is_sparse:
            raise DataError(f"{where}: member {member.name!r} is a sparse file: pack it anew")
        if member.target:
            if member.target not in seen:
                raise DataError(f"{where}: member {member.name!r} is a hard link to {member.target!r}, which does not "
                                "stand before it: pack it anew")  # fmt: skip
            linked = seen[member.target]
            if linked is not None:
                member = replace(member, offset=linked.offset, size=linked.size, is_plain=True)
        seen[member.name] = member if member.is_plain else None
        if member.is_plain:
            yield member
        elif left_out is not None:
            left_out.append(member.name)


def padded(size: int) -> int:
    """Bytes that a file of ``size`` takes in a tar: a header, and its data up to a whole block."""
    return tarfile.BLOCKSIZE + size + -size % tarfile.BLOCKSIZE


def _run(file: BinaryIO, start: int, size: int, shard: str) -> Generator[Member | Fault, None, int | None]:
    """Members from ``start`` up to the first block that is no header; returns that block's offset, or None
    where the file ends within a member."""
    end = start
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps all it has seen
                end = info.offset_data + info.size
                plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) and info.sparse is None
                if info.size < 0 or tar.offset <= info.offset or info.offset >= size:
                    return info.offset
                if plain and end > size:
                    reason = f"truncated: member {info.name!r} should end at byte {end}, the file ends at byte {size}"
                    yield Fault(shard, "tar", reason, byte=info.offset_data)
                    return None
                if not info.isdir() and not _META.match(info.name):
                    sparse, target = info.sparse is not None, info.linkname if info.islnk() else ""
                    yield Member(info.name, info.offset, info.offset_data, info.size, plain, sparse, target)
                end = tar.offset
            return tar.offset
    except (OSError, DataError):
        raise
    except Exception:  # a header whose checksum is right may hold anything, and tarfile then raises anything
        return end


def _next_header(file: BinaryIO, start: int, size: int) -> int | None:
    """Offset of the next valid header at or after ``start``, aligned or not."""
    at = start + _BLOCK
    while at < size:
        file.seek(at)
        piece = file.read(min(_PIECE, size - at))
        found = piece.find(_MAGIC)
        while found >= 0:
            header = at + found - _MAGIC_AT
            file.seek(header)
            try:
                tarfile.TarInfo.frombuf(file.read(min(_BLOCK, size - header)), "utf-8", "surrogateescape")
                return header
            except tarfile.HeaderError:
                found = piece.find(_MAGIC, found + 1)
        at += max(len(piece) - len(_MAGIC) + 1, 1)
    return None


def _end_fault(file: BinaryIO, end: int, start: int, size: int, more: bool) -> str:
    """What is wrong with the end at ``end`` of a tar at ``start``; empty if it ends as it should."""
    file.seek(end)
    tail = file.read(min(_MARK, size - end))
    if tail == bytes(_MARK):
        return "more members follow the end-of-archive mark: tars put together by cat are not one tar" if more else ""
    if end == start:
        kind = next((name for magic, name in _COMPRESSED.items() if tail.startswith(magic)), None)
        if kind:
            return f"compressed with {kind}: unpack it, compressed tars have no random access"
    if len(tail) < _BLOCK or not tail.strip(b"\0"):
        return f"truncated: no end-of-archive mark, the file ends at byte {size}"
    what = "damaged" if end > start or more else "no plain tar"
    return f"{what}: neither a member's header nor the end-of-archive mark"
