"""What a tar shard holds: the position of every sample's image, and its label."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data_prep.tar import Fault, Member, members
from ummim.data.shards import UNLABELLED, Shard, table_dtype

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")  # in order of preference
_TWICE = "the key comes twice in this shard"
KEY_BYTES = 1024  # every row of the table has room for the longest key


@dataclass(frozen=True)
class Rules:
    """What of foreign shards goes into the index, and how.

    A sample is a run of members with the same name up to the first dot of the file name; members without one
    do not count (both as in WebDataset).

    Attributes:
        image: extensions that may hold the image, in order of preference.
        labels: read labels, from the number in ``.cls``,
        label_field: or, if given, from this field of ``.json``.
        last_dot: the extension begins at the last dot of the file name, not at the first.
        prefix_keys: a key is the shard's name without ``.tar``, a slash, and the key in the shard.
        skip_incomplete: leave out samples without an image, and those without a label where others have one.
    """

    image: tuple[str, ...] = IMAGES
    labels: bool = True
    label_field: str | None = None
    last_dot: bool = False
    prefix_keys: bool = False
    skip_incomplete: bool = False


@dataclass
class Survey:
    """What was found in a shard.

    Attributes:
        rows: ``table_dtype`` of its sound samples, by offset; ``shard`` is left 0.
        faults: everything that is wrong with the others, and with the tar.
        skipped: incomplete samples left out by ``Rules.skip_incomplete``.
        several: samples with more than one image among ``Rules.image``.
        ignored: members without an extension, links and sparse files.
    """

    rows: np.ndarray
    faults: list[Fault] = field(default_factory=list)
    skipped: int = 0
    several: int = 0
    ignored: int = 0


class _Sample(NamedTuple):
    key: str
    members: dict[str, Member]  # by lower-case extension


class _Incomplete(Exception):
    """The sample lacks its image or its label."""


class _Wrong(Exception):
    """The sample is faulty; ``args``: kind, reason, offset."""


def survey(path: Path, name: str, rules: Rules, labelled: bool = False) -> Survey:
    """Read the headers (and labels) of the shard ``path``, called ``name`` in the index.

    With ``labelled``, a sample without a label is incomplete.

    Raises:
        OSError: the file cannot be read.
    """
    found = Survey(np.empty(0))
    records: list[tuple[bytes, int, int, int, int]] = []
    seen: set[str] = set()
    with path.open("rb") as file:
        for sample in _samples(file, name, rules, found):
            key, first = sample.key, min(member.header for member in sample.members.values())
            try:
                if key in seen:
                    raise _Wrong("key", f"{_TWICE}: keep its members side by side, and keys unique", first)
                seen.add(key)
                image = _image(sample, rules, found)
                label = _label(file, sample, rules) if rules.labels else UNLABELLED
                if labelled and label == UNLABELLED:
                    where = f"field {rules.label_field!r} of its .json" if rules.label_field else ".cls"
                    raise _Incomplete(f"no label ({where}), though the data is labelled")
                records.append((_encoded(key, first), 0, image.offset, image.size, label))
            except _Incomplete as lack:
                if rules.skip_incomplete:
                    found.skipped += 1
                else:
                    found.faults.append(Fault(name, "member", str(lack), key, first))
            except _Wrong as wrong:
                kind, reason, byte = wrong.args
                found.faults.append(Fault(name, kind, reason, key, byte))
    found.rows = np.array(records, table_dtype(max((len(record[0]) for record in records), default=1)))
    return found


def checksum(path: Path) -> Shard:
    """Name, size and SHA-256 of a shard; its count of samples is left 0."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Shard(path.name, os.fstat(file.fileno()).st_size, digest, 0)


def key_text(key: bytes) -> str:
    """A key of the table, for messages, whatever its bytes."""
    return bytes(key).decode("utf-8", "backslashreplace")


def _samples(file: BinaryIO, name: str, rules: Rules, found: Survey) -> Iterator[_Sample]:
    """Samples in the order of the tar; faults of the tar and of repeated members go to ``found``."""
    prefix = f"{name.removesuffix('.tar')}/" if rules.prefix_keys else ""
    sample = _Sample("", {})
    for member in members(file, name):
        if isinstance(member, Fault):
            found.faults.append(member)
            continue
        key, extension = _split(member.name, rules.last_dot)
        if not key or not member.is_plain:
            found.ignored += 1
            continue
        key = prefix + key
        if key != sample.key:
            if sample.members:
                yield sample
            sample = _Sample(key, {})
        if extension in sample.members:
            reason = f"{_TWICE}, both times with .{extension}: keys must be unique"
            found.faults.append(Fault(name, "key", reason, key, member.header))
            continue
        sample.members[extension] = member
    if sample.members:
        yield sample


def _split(name: str, last_dot: bool) -> tuple[str, str]:
    """Key and lower-case extension of a member; an empty key if it has no extension."""
    folder, slash, file_name = name.rpartition("/")
    stem, dot, extension = file_name.rpartition(".") if last_dot else file_name.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else ("", "")


def _image(sample: _Sample, rules: Rules, found: Survey) -> Member:
    images = [sample.members[extension] for extension in rules.image if extension in sample.members]
    if not images:
        wanted = f" ({', '.join(rules.image)})" if rules.image != IMAGES else ""
        raise _Incomplete(f"no image{wanted}, only {', '.join(sorted(sample.members))}")
    found.several += len(images) > 1
    if images[0].size >= 2**32:
        raise _Wrong("image", "the image has more than 4 GiB", images[0].offset)
    return images[0]


def _label(file: BinaryIO, sample: _Sample, rules: Rules) -> int:
    member = sample.members.get("json" if rules.label_field else "cls")
    if member is None:
        return UNLABELLED
    content = os.pread(file.fileno(), member.size, member.offset)
    found: object = content
    if rules.label_field:
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError):
            raise _Wrong("label", "its .json is not JSON", member.offset) from None
        found = fields.get(rules.label_field) if isinstance(fields, dict) else None
        if found is None:
            return UNLABELLED
    try:
        label = int(found) if isinstance(found, bytes | str | int) and not isinstance(found, bool) else -1
    except ValueError:
        label = -1
    if not 0 <= label < 2**31:
        where = f"field {rules.label_field!r} of .json" if rules.label_field else ".cls"
        raise _Wrong("label", f"the label in {where} is {str(found)[:40]}, not a number from 0", member.offset)
    return label


def _encoded(key: str, header: int) -> bytes:
    """The key in UTF-8; bytes of a name in another encoding as ``\\udcXX``."""
    encoded = key.encode("utf-8", "backslashreplace")
    if b"\0" in encoded:
        raise _Wrong("key", "the key holds a zero byte", header)
    if len(encoded) > KEY_BYTES:
        raise _Wrong("key", f"the key has {len(encoded)} bytes, more than {KEY_BYTES}", header)
    return encoded
