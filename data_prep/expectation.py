"""What the files beside the shards promise: read for ``verify`` as far as they can be read."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_prep.index import file_sha256, sealed
from data_prep.scan import Rules
from data_prep.tar import Fault
from ummim.data.index_files import load_table
from ummim.data.shards import CLASSES, FORMAT, INDEX, JOURNAL, TABLE, Shard, read_classes
from ummim.data.urls import is_url
from ummim.errors import DataError

_FIELDS = {
    "format": str,
    "samples": int,
    "labelled": bool,
    "source": str | None,
    "rules": dict,
    "table_sha256": str,
    "classes_sha256": str | None,
    "url": str | None,
    "shards": list,
    "index_sha256": str,
}
_SHARD = {"name": str, "bytes": int, "sha256": str, "samples": int}
_LATER = {"rules", "classes_sha256", "url", "index_sha256"}  # an index without them is merely checked less closely


@dataclass
class Expectation:
    """What ``verify`` compares the shards with.

    Attributes:
        shards: as in the index; None if the index cannot be read, then every tar of the folder counts.
        table: the sample table; None if it cannot be read or belongs to other shards.
        labelled, rules: of the index.
        classes: number of class names; None for unlabelled data, or if they cannot be read.
        url: where the shards lie, if not beside their index.
        faults: of the index, the table and the class list themselves.
    """

    shards: list[Shard] | None = None
    table: np.ndarray | None = None
    labelled: bool = False
    rules: Rules = Rules()
    classes: int | None = None
    url: str | None = None
    faults: list[Fault] = field(default_factory=list)

    def fault(self, file: str, reason: str) -> None:
        self.faults.append(Fault(file, "index", reason))


class _Unusable(Exception):
    """A file that cannot be used; the message says why."""


def read_expectation(folder: Path) -> Expectation:
    """Read index, table and class list of ``folder``; never raises for what is in them."""
    expected = Expectation()
    if (folder / JOURNAL).exists():
        expected.fault(JOURNAL, "the build has not finished: run the same command again, it goes on where it was")
    try:
        content = _read_index(folder, expected)
        expected.labelled = content["labelled"]
        expected.rules = Rules(labels=expected.labelled)
        expected.shards, expected.url = _shards(content, expected), content.get("url")
        if "rules" in content:
            expected.rules = _rules(content["rules"])
    except _Unusable as error:
        expected.fault(INDEX, str(error))
    if expected.shards is None:
        return expected
    try:
        expected.table = _read_table(folder, content["table_sha256"], expected.shards, expected)
    except _Unusable as error:
        expected.fault(TABLE, str(error))
    if expected.labelled:
        try:
            expected.classes = _read_classes(folder, content, expected)
        except _Unusable as error:
            expected.fault(CLASSES, str(error))
    return expected


def _read_index(folder: Path, expected: Expectation) -> dict:
    try:
        raw = (folder / INDEX).read_bytes()
        content = json.loads(raw)
    except OSError as error:
        raise _Unusable(f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise _Unusable("is not JSON") from None
    if not isinstance(content, dict):
        raise _Unusable("is no index")
    for name, kind in _FIELDS.items():
        if name not in content and name not in _LATER:
            raise _Unusable(f"has no field {name!r}")
        if name in content and (not isinstance(content[name], kind) or (kind is int and content[name] is True)):
            raise _Unusable(f"field {name!r} is {str(content[name])[:60]!r}")
    if content["format"] != FORMAT:
        raise _Unusable(f"has format {content['format']!r}, not {FORMAT!r}")
    if content.get("url") is not None and not is_url(content["url"]):
        raise _Unusable(f"field 'url' is {content['url'][:60]!r}")
    if set(content) - set(_FIELDS):
        expected.fault(INDEX, f"has unknown fields: {', '.join(sorted(set(content) - set(_FIELDS)))}")
    if "index_sha256" in content and sealed({k: v for k, v in content.items() if k != "index_sha256"}) != raw:
        expected.fault(INDEX, "was changed after it was written: its own checksum differs")
    return content


def _shards(content: dict, expected: Expectation) -> list[Shard]:
    shards = []
    for entry in content["shards"]:
        if not isinstance(entry, dict) or {name: type(value) for name, value in entry.items()} != _SHARD:
            raise _Unusable(f"a shard's entry is {str(entry)[:60]!r}")
        shard = Shard(**entry)
        if shard.bytes < 0 or shard.samples < 0:
            raise _Unusable(f"shard {shard.name!r} has {shard.bytes} bytes and {shard.samples} samples")
        path = PurePosixPath(shard.name)
        if path.is_absolute() or ".." in path.parts or not path.name or "\0" in shard.name:
            raise _Unusable(f"shard {shard.name!r} does not lie in the folder")
        shards.append(shard)
    if len({shard.name for shard in shards}) < len(shards):
        expected.fault(INDEX, "lists a shard twice")
    total = sum(shard.samples for shard in shards)
    if total != content["samples"]:
        expected.fault(INDEX, f"has {content['samples']} samples, its shards' sum is {total}")
    return shards


def _rules(found: dict) -> Rules:
    kinds: dict[str, Any] = {item.name: str | None if item.name == "label_field" else bool for item in fields(Rules)}
    kinds["image"] = list
    if set(found) != set(kinds) or not all(isinstance(found[name], kind) for name, kind in kinds.items()):
        raise _Unusable(f"field 'rules' is {str(found)[:60]!r}")
    return Rules(**{**found, "image": tuple(found["image"])})


def _read_table(folder: Path, sha256: str, shards: list[Shard], expected: Expectation) -> np.ndarray:
    try:
        table = load_table(folder / TABLE)
    except OSError as error:
        raise _Unusable(f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise _Unusable(str(error)) from None
    if file_sha256(folder / TABLE) != sha256:
        expected.fault(TABLE, f"is not the table that {INDEX} was made with: its checksum differs")
    samples = [shard.samples for shard in shards]
    if len(table) != sum(samples):
        raise _Unusable(f"has {len(table)} rows, {INDEX} lists {sum(samples)} samples")
    wrong = np.flatnonzero(table["shard"] != np.repeat(np.arange(len(shards)), samples))
    if wrong.size:
        expected.fault(TABLE, f"row {wrong[0]} is of shard {table['shard'][wrong[0]]}, {INDEX} says otherwise")
    return table


def _read_classes(folder: Path, content: dict, expected: Expectation) -> int:
    try:
        classes = read_classes(folder)
    except DataError as error:
        raise _Unusable(str(error).removeprefix(f"{folder / CLASSES} ")) from None
    if classes is None:
        raise _Unusable("is missing, but the samples are labelled")
    if "classes_sha256" in content and file_sha256(folder / CLASSES) != content["classes_sha256"]:
        expected.fault(CLASSES, f"was changed after {INDEX} was written: its checksum differs")
    return len(classes)
