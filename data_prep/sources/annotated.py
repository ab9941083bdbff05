"""iNaturalist's annotations, in COCO's layout: one JSON file with the lists images, annotations and categories.

Source: the iNaturalist competitions of 2017 to 2021 (github.com/visipedia/inat_comp), such as ``train2018.json``.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from data_prep.locations import exists, read, size
from data_prep.sources.item import Item, Source, check_classes, make_key
from data_prep.sources.manifest import locate
from ummim.data.shards import UNLABELLED
from ummim.data.urls import is_url, local_path, parent
from ummim.errors import DataError

SUFFIX = ".json"


def annotated_source(path: str, root: str | None, unlabelled: bool) -> Source:
    """The images that the file lists, in its order, their ``file_name`` being relative to ``root`` (the file's folder).

    Labels number the categories in the order of their ids, so that the training and the validation file, which list the
    same categories, number them alike; iNaturalist's ids are labels already. A class is named by its category's name,
    or by its id where names repeat. Files without annotations (the competitions' test images) have no labels.

    Raises:
        DataError: a file that is not of this layout, an id or an image that comes twice, an image without a category or
            with two, a category that is not listed, or a path out of ``root``; with the id.
    """
    root = local_path(root or parent(path))
    if not exists(root):
        raise DataError(f"--root {root} does not exist")
    images, annotations, categories = _lists(path)
    by_id = _by_id(path, "images", images)
    labels: Mapping[Hashable, int] = {}
    classes = None
    if annotations and not unlabelled:
        classes, number = _classes(path, categories)
        labels = _labels(path, annotations, by_id, number)
    items: list[Item] = []
    used: set[str] = set()
    known: dict[str, Hashable] = {}
    for image in images:
        where, name = f"{path}: image {image['id']}", image.get("file_name")
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: file_name is {name!r}, not the path of an image")
        location, inside = locate(name, root, where)
        if location in known:
            raise DataError(f"{where}: {name} is image {known[location]}'s already")
        known[location] = image["id"]
        if labels and image["id"] not in labels:
            raise DataError(f"{where}: has no annotation: complete them, or take the images without: --unlabelled")
        length = 0 if is_url(location) else size(location)
        items.append(Item(make_key(inside, used), location, labels.get(image["id"], UNLABELLED), length))
    return Source(items, classes)


def _lists(path: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """(images, annotations, categories), each a list of objects; the last two may be missing."""
    try:
        held = json.loads(read(path).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(held, dict) or not held.get("images"):
        raise DataError(f"{path} is no annotation file as iNaturalist has them: it has no list images")
    lists = []
    for name in ("images", "annotations", "categories"):
        entries = held.get(name) or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{path}: {name} is no list of objects")
        lists.append(entries)
    return lists[0], lists[1], lists[2]


def _by_id(path: str, name: str, entries: Sequence[dict[str, Any]]) -> dict[Hashable, dict[str, Any]]:
    """{id: entry}."""
    found: dict[Hashable, dict[str, Any]] = {}
    for number, entry in enumerate(entries):
        own = entry.get("id")
        if isinstance(own, bool) or not isinstance(own, int | str):
            raise DataError(f"{path}: {name}[{number}] has the id {own!r}, not a number or a name")
        if own in found:
            raise DataError(f"{path}: the id {own!r} comes twice in {name}")
        found[own] = entry
    return found


def _classes(path: str, categories: Sequence[dict[str, Any]]) -> tuple[list[str], dict[Hashable, int]]:
    """Class names by label, and {category id: label}."""
    if not categories:
        raise DataError(f"{path}: has annotations, but no list categories that says what they mean")
    by_id = _by_id(path, "categories", categories)
    if len({type(own) for own in by_id}) > 1:
        raise DataError(f"{path}: the ids of its categories are numbers and names: they have no order")
    order = sorted(by_id)  # type: ignore[type-var]  # all numbers or all names
    names = [str(by_id[own].get("name") or own) for own in order]
    if len(set(names)) < len(names):
        names = [str(own) for own in order]
    return check_classes(path, names), {own: label for label, own in enumerate(order)}


def _labels(
    path: str, annotations: Sequence[dict[str, Any]], images: Mapping[Hashable, Any], number: Mapping[Hashable, int]
) -> dict[Hashable, int]:
    """{image id: label}."""
    labels: dict[Hashable, int] = {}
    for annotation in annotations:
        image, category = annotation.get("image_id"), annotation.get("category_id")
        if not isinstance(image, int | str) or image not in images:
            raise DataError(f"{path}: annotation {annotation.get('id')!r}: there is no image {image!r}")
        if not isinstance(category, int | str) or category not in number:
            raise DataError(f"{path}: annotation {annotation.get('id')!r}: there is no category {category!r}")
        if labels.setdefault(image, number[category]) != number[category]:
            raise DataError(f"{path}: image {image!r} has two categories: these images have one each")
    return labels
