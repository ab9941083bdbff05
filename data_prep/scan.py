"""What a tar shard holds: the position of every sample's image, and its label."""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ummim.data.shards import UNLABELLED, Shard, table_dtype
from ummim.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")  # in order of preference
_END = 1024  # a tar ends with two zero blocks


def scan(path: Path, labels: bool = True) -> np.ndarray:
    """Rows of ``table_dtype`` for the samples of a tar, by offset; ``shard`` is left 0.

    A sample is a run of members with the same name up to the first dot (WebDataset's rule); its image is the
    member with an image's extension, its label the number in ``.cls``.

    Raises:
        DataError: the tar is missing, cut short or damaged, a sample has no image or comes twice, or a label
            is no number.
    """
    records: list[tuple[bytes, int, int, int, int]] = []
    seen: set[str] = set()
    try:
        with path.open("rb") as file:
            for key, members in _samples(path, file):
                image = next((members[name] for name in IMAGES if name in members), None)
                if image is None:
                    has = ", ".join(sorted(members))
                    raise DataError(f"{path}: key {key!r} has no image, only {has}: remove it from the shard")
                if key in seen:
                    raise _twice(path, key, image)
                seen.add(key)
                label = _label(path, file, key, members["cls"]) if labels and "cls" in members else UNLABELLED
                records.append((_encode(key), 0, image.offset_data, image.size, label))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return np.array(records, table_dtype(max((len(record[0]) for record in records), default=1)))


def checksum(path: Path) -> Shard:
    """Name, size and SHA-256 of a shard; its count of samples is left 0."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Shard(path.name, os.fstat(file.fileno()).st_size, digest, 0)


def _samples(path: Path, file: BinaryIO) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(key, members by lower-case extension) of each sample, in the order of the tar."""
    key = ""
    members: dict[str, tarfile.TarInfo] = {}
    for member in _members(path, file):
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        extension = extension.lower()
        if folder + slash + stem != key:
            if members:
                yield key, members
            key, members = folder + slash + stem, {}
        if extension in members:
            raise _twice(path, key, member)
        members[extension] = member
    if members:
        yield key, members


def _members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar, and a check that it ends where a tar ends.

    Python's ``tarfile`` takes a tar that stops between two members, or goes on with rubbish, for a whole one.
    """
    size = os.fstat(file.fileno()).st_size
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + member.size
                if end > size:
                    raise tarfile.ReadError(f"member {member.name!r} should end at byte {end}")
                if member.isfile() and not member.name.startswith("__"):
                    yield member
            end = tar.offset
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{path}: truncated at byte {size}, or no plain tar ({error}): restore the shard") from None
    tail = os.pread(file.fileno(), _END, end)
    if tail != bytes(_END):
        fault = f"damaged at byte {end}" if tail.strip(b"\0") else f"truncated at byte {size}"
        raise DataError(f"{path}: {fault}: no end-of-archive mark after the last member: restore the shard")


def _label(path: Path, file: BinaryIO, key: str, member: tarfile.TarInfo) -> int:
    text = os.pread(file.fileno(), member.size, member.offset_data)
    try:
        label = int(text)
    except ValueError:
        label = -1
    if not 0 <= label < 2**31:
        raise DataError(
            f"{path}: key {key!r} has the label {text[:40]!r} in .cls, not a number from 0: "
            "mend it, or index without labels: --ignore-labels"
        )
    return label


def _encode(key: str) -> bytes:
    return key.encode("utf-8", "replace")  # names of another encoding come as lone surrogates


def _twice(path: Path, key: str, member: tarfile.TarInfo) -> DataError:
    return DataError(f"{path}: key {key!r} comes twice, again at byte {member.offset}: keys must be unique")
