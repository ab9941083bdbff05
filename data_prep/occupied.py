"""Destinations that hold something which a build would replace without being asked to."""

import json
import os
import re
from collections.abc import Collection

from data_prep.locations import connect, read
from data_prep.target import Target
from ummim.data.shards import CLASSES, INDEX, TABLE
from ummim.data.urls import basename, is_url, is_web, join, parent, shown
from ummim.errors import DataError

QUARANTINE = "quarantine.jsonl"
SUMMARY = "summary.json"
_OWN_SHARD = re.compile(r"shard-\d{6,}\.tar")


def is_own_shard(name: str) -> bool:
    """Whether a build calls its shards so."""
    return _OWN_SHARD.fullmatch(name) is not None


def refuse_sources(target: Target, sources: Collection[str]) -> None:
    """Raise DataError if one of ``sources``, files by path or URL, would be replaced by a shard before it is read."""
    folder = os.path.realpath(target.folder)
    for location in sorted(sources):
        if _lies_in(location, folder, target.url):
            raise DataError(
                f"{shown(location)} is one of the shards to build from, and the build would replace it in {target}: "
                "build into another folder"
            )


def refuse_others(target: Target, identity: str, overwrite: bool, unfinished: bool) -> None:
    """Raise DataError if ``target`` holds what is not this build's (by ``identity``) to replace.

    ``unfinished``: there is a journal, so that the shards are of a build without an index.
    """
    sizes = target.sizes()
    tars = sorted(name for name in sizes if name.endswith(".tar"))
    foreign = [name for name in tars if not is_own_shard(name)]
    if foreign:
        raise DataError(f"{target} holds other tars ({foreign[0]}): build into another folder")
    if overwrite or unfinished:
        return
    lost = "" if target.url is None else f", or those of a build whose journal is not in {target.folder} (--staging)"
    if tars or INDEX in sizes:
        spoilt = _spoilt(target, identity, sizes)
        if spoilt is not None:
            raise DataError(f"{target}: this build was finished here, but its {spoilt} is missing or has changed: "
                            "restore it, or build all of it anew: --overwrite")  # fmt: skip
        raise DataError(
            f"{target} already holds the shards of other images or options{lost}: build into another folder, "
            "or replace them: --overwrite"
        )
    beside = [name for name in (CLASSES, TABLE, SUMMARY, QUARANTINE) if name in sizes]
    if beside:
        raise DataError(f"{target} holds other files ({', '.join(beside)}){lost}: build into another folder, "
                        "or replace them: --overwrite")  # fmt: skip


def _lies_in(location: str, folder: str, url: str | None) -> bool:
    """Whether ``location`` has a shard's name in ``folder`` (links followed) or in ``url``."""
    if is_url(location):
        named = url is not None and not is_web(location) and is_own_shard(basename(location))
        return named and connect(parent(location)) == connect(str(url))
    beside = os.path.realpath(parent(location)), basename(location)  # the link itself would go
    behind = os.path.split(os.path.realpath(location))
    return any(place == folder and is_own_shard(name) for place, name in (beside, behind))


def _spoilt(target: Target, identity: str, sizes: dict[str, int]) -> str | None:
    """The file of this very build, finished here, that is not as its index says; None: the index is of another."""
    try:
        content = json.loads(read(join(str(target), INDEX)))
        if content["source"] != identity:
            return None
        wrong = [shard["name"] for shard in content["shards"] if sizes.get(shard["name"]) != shard["bytes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    missing = [CLASSES] if content.get("labelled") and CLASSES not in sizes else []
    return [*wrong, *missing, f"{TABLE} or {CLASSES}"][0]
