"""Parquet files with the images' bytes in a column, as Hugging Face's datasets are stored."""

import json
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from data_prep.locations import open_seekable, size
from data_prep.sources.item import Item, Source, check_classes, make_key, number_labels
from ummim.data.shards import UNLABELLED
from ummim.data.urls import basename
from ummim.errors import DataError

_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content")
_LABELS = ("label", "labels", "cls", "class", "fine_label")
_SPLIT = re.compile(r"(.+)-\d+-of-\d+(-[0-9a-f]+)?\.parquet")
_LARGEST = 2 * 10**9  # bytes of a row group, which is read as a whole


def parquet_source(
    files: Sequence[tuple[str, str]], image_column: str | None, label_column: str | None, unlabelled: bool
) -> Source:
    """The rows of ``files`` (location, name for the keys), in order; key ``<name>-<row>``.

    The image's column is the one that Hugging Face's metadata, its type (struct of bytes and path) or its name tells;
    labels are numbers, named by Hugging Face's metadata if it does, or names.

    Raises:
        DataError: a file that is no Parquet, a column that is missing or not as it should be, several splits, or
            row groups too large to be read.
    """
    splits = sorted({match[1] for match in (_SPLIT.fullmatch(basename(name)) for _, name in files) if match})
    if len(splits) > 1:
        raise DataError(f"{files[0][0]} and the files beside it are several splits ({', '.join(splits)}): "
                        f"give one as SRC, e.g. '.../{splits[0]}-*.parquet'")  # fmt: skip
    items: list[Item] = []
    values: list[Any] = []
    used: set[str] = set()
    classes: list[str] | None = None
    group = 0
    for path, name in files:
        file = _open(path)
        features = _features(file)
        image = _image_column(path, file, features, image_column)
        label = None if unlabelled else _label_column(path, file, features, label_column)
        stem = make_key(name, used)
        total = size(path)
        position = 0
        for number in range(file.num_row_groups):
            rows = file.metadata.row_group(number).num_rows
            _check_group(path, file, number)
            items += [
                Item(f"{stem}-{row:06d}", f"{path}#{image}", UNLABELLED, total, row, "parquet", group)
                for row in range(position, position + rows)
            ]
            position += rows
            group += 1
        if label is None:
            continue
        values += file.read(columns=[label], use_threads=False).column(label).to_pylist()
        names = features.get(label, {}).get("names")
        if classes is not None and names != classes:
            raise DataError(f"{path}: its class names are not those of the files before it")
        classes = names
    if not items:
        raise DataError(f"{files[0][0]} holds no rows")
    return _labelled(files[0][0], items, values, classes)


def read_image(location: str, row: int) -> bytes:
    """The bytes of the image in a row; ``location`` is ``file#column``. The row group is kept for the next call.

    Raises:
        ValueError: the row holds no bytes.
    """
    path, _, column = location.rpartition("#")
    file = _opened(path, os.getpid())
    start = 0
    for number in range(file.num_row_groups):
        rows = file.metadata.row_group(number).num_rows
        if row < start + rows:
            break
        start += rows
    value = _row_group(path, column, number, os.getpid())[row - start].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not data:
        elsewhere = value.get("path") if isinstance(value, dict) else None
        raise ValueError(f"the row has no bytes, only the path {elsewhere}" if elsewhere else "the row has no bytes")
    return data


@lru_cache(maxsize=1)
def _row_group(path: str, column: str, number: int, process: int) -> Any:
    return _opened(path, process).read_row_group(number, columns=[column], use_threads=False).column(column)


@lru_cache(maxsize=4)
def _opened(path: str, process: int) -> Any:  # a forked process shares the file's offset with its parent
    return _open(path)


def _open(path: str) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError("Parquet is read with pyarrow: pip install 'ummim[parquet]'") from None
    try:
        return ParquetFile(open_seekable(path))
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file, or a damaged one: {error}") from None


def _features(file: Any) -> dict[str, dict]:
    """Hugging Face's description of the columns, or nothing."""
    try:
        features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (TypeError, KeyError, ValueError, AttributeError):
        return {}


def _image_column(path: str, file: Any, features: dict[str, dict], wanted: str | None) -> str:
    from pyarrow import types

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    columns = {field.name: field.type for field in file.schema_arrow}
    suited = [name for name, kind in columns.items() if holds_bytes(kind)]
    listing = ", ".join(f"{name} ({kind})" for name, kind in columns.items())[:300]
    if wanted is not None:
        if wanted not in suited:
            raise DataError(f"{path}: --image-column {wanted} is no column of bytes; the columns: {listing}")
        return wanted
    told = [name for name in suited if features.get(name, {}).get("_type") == "Image"]
    structs = [name for name in suited if types.is_struct(columns[name])]
    named = [name for name in _IMAGES if name in suited]
    for found in (told, named, structs, suited):
        if len(found) == 1 or (found and found is named):
            return found[0]
    raise DataError(f"{path}: no column, or no single one, holds the images: name it with --image-column; "
                    f"the columns: {listing}")  # fmt: skip


def _label_column(path: str, file: Any, features: dict[str, dict], wanted: str | None) -> str | None:
    names = file.schema_arrow.names
    if wanted is not None:
        if wanted not in names:
            raise DataError(f"{path}: there is no --label-column {wanted}; the columns: {', '.join(names)}")
        return wanted
    told = [name for name in names if features.get(name, {}).get("_type") == "ClassLabel"]
    if len(told) == 1:
        return told[0]
    return next((name for name in _LABELS if name in names), None)


def _check_group(path: str, file: Any, number: int) -> None:
    total = file.metadata.row_group(number).total_byte_size
    if total > _LARGEST:
        raise DataError(f"{path}: a row group of {total / 1e9:.1f} GB would be held in memory as a whole; write "
                        "smaller ones, e.g. pyarrow.parquet.write_table(..., row_group_size=500)")  # fmt: skip


def _labelled(where: str, items: list[Item], values: list[Any], classes: list[str] | None) -> Source:
    if not values or all(value == UNLABELLED or value is None for value in values):
        return Source(items, None)
    for item, value in zip(items, values, strict=True):
        if value is None or isinstance(value, bool) or not isinstance(value, str | int):
            raise DataError(f"{item.name}: its label is {value!r}, not a number or a name: complete it, choose another "
                            "--label-column, or take the images without labels: --unlabelled")  # fmt: skip
    labels, named = number_labels(f"{where}, labels", values)
    if classes is not None:
        if len(named) > len(classes):
            raise DataError(f"{where}: label {len(named) - 1}, but the metadata name {len(classes)} classes")
        named = check_classes(where, classes)
    return Source([item._replace(label=label) for item, label in zip(items, labels, strict=True)], named)
