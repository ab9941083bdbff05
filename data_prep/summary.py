"""What a build made: counts per class, sizes, formats, and what was left out."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from data_prep.journal import Bad
from data_prep.occupied import QUARANTINE, SUMMARY
from data_prep.shard_writer import Finished

_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
_SHOWN = 4  # formats and reasons that the command prints; the rest is in the file


def summarise(shards: Sequence[Finished], bad: Sequence[Bad], classes: Sequence[str] | None) -> dict:
    """The content of ``summary.json``: a function of the shards and of what was left out alone."""
    sizes = np.concatenate([entry.sizes for entry in shards])
    lengths = np.concatenate([entry.rows["length"] for entry in shards])
    labels = np.concatenate([entry.rows["label"] for entry in shards])
    kinds: Counter[str] = Counter()
    for entry in shards:
        kinds.update(entry.kinds)
    reasons = Counter(re.sub(r"\d+", "N", entry.reason) for entry in bad)
    counts = np.bincount(labels[labels >= 0], minlength=len(classes)).tolist() if classes is not None else []
    return {
        "samples": len(labels),
        "shards": len(shards),
        "bytes": sum(entry.shard.bytes for entry in shards),
        "width": _percentiles(sizes[:, 0]),
        "height": _percentiles(sizes[:, 1]),
        "image_bytes": _percentiles(lengths),
        "kinds": _ranked(kinds),
        "quarantined": _ranked(reasons),
        "classes": None if classes is None else dict(zip(classes, counts, strict=True)),
    }


def report(summary: dict) -> list[str]:
    """The lines that the command prints."""
    lines = []
    if summary["classes"] is not None:
        counts = sorted(summary["classes"].values())
        empty = f", {counts.count(0):,} of them empty" if not counts[0] else ""
        lines.append(f"{len(counts):,} classes{empty}; images of a class: {counts[0]:,} to {counts[-1]:,}, "
                     f"median {counts[len(counts) // 2]:,}")  # fmt: skip
    for name in ("width", "height", "image_bytes"):
        part = summary[name]
        unit = " bytes" if name == "image_bytes" else " pixels"
        lines.append(f"{name.replace('_', ' ')}: {part['0%']:,} to {part['100%']:,}{unit}, median {part['50%']:,}, "
                     f"90% of them {part['5%']:,} to {part['95%']:,}")  # fmt: skip
    lines.append(f"read as: {_listed(summary['kinds'])}")
    if summary["quarantined"]:
        total = sum(summary["quarantined"].values())
        lines.append(f"{total:,} unreadable images left out, listed in {QUARANTINE}: {_listed(summary['quarantined'])}")
    lines.append(f"all counts: {SUMMARY}")
    return lines


def _percentiles(values: np.ndarray) -> dict[str, int]:
    found = np.percentile(values, _PERCENTILES, method="nearest")
    return {f"{percent}%": int(value) for percent, value in zip(_PERCENTILES, found, strict=True)}


def _ranked(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def _listed(counts: dict[str, int]) -> str:
    shown = [f"{count:,} {name}" for name, count in list(counts.items())[:_SHOWN]]
    return ", ".join(shown + ([f"{len(counts) - _SHOWN} more kinds"] if len(counts) > _SHOWN else []))
