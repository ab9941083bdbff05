"""Small histograms as text."""

from collections.abc import Mapping

import numpy as np

_BINS, _BAR, _NAME = 10, 40, 32


def bars(title: str, counts: Mapping[str, int], total: int | None = None) -> str:
    """A title, and a line for each count: name, bar, count, share of ``total`` (or of the counts' sum)."""
    total = total or sum(counts.values()) or 1
    names = {name: name if len(name) <= _NAME else name[: _NAME - 3] + "..." for name in counts}
    width = max((len(name) for name in names.values()), default=0)
    digits = len(f"{max(counts.values(), default=0):,}")
    most = max(counts.values(), default=0) or 1
    lines = [title]
    for name, count in counts.items():
        bar = "#" * max(round(_BAR * count / most), int(count > 0))
        lines.append(f"  {names[name]:{width}} {count:{digits},} {100 * count / total:5.1f}% {bar}".rstrip())
    return "\n".join(lines)


def histogram(title: str, values: np.ndarray) -> str:
    """Least, median and greatest of ``values`` (n > 0), and how they are spread over bins of equal ratio."""
    least, median, greatest = (_number(float(np.quantile(values, q))) for q in (0, 0.5, 1))
    title = f"{title}: {least} to {greatest}, median {median}"
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _BINS:
        named = zip(distinct.tolist(), counts.tolist(), strict=True)
        return bars(title, {_number(float(value)): count for value, count in named})
    edges = _edges(float(values.min()), float(values.max()))
    counts, _ = np.histogram(values, edges)
    texts = [_number(edge) for edge in edges.tolist()]
    first, last = max(map(len, texts[:-1])), max(map(len, texts[1:]))
    names = [f"{a:>{first}} to {b:>{last}}" for a, b in zip(texts[:-1], texts[1:], strict=True)]
    return bars(title, dict(zip(names, counts.tolist(), strict=True)))


def _edges(least: float, greatest: float) -> np.ndarray:
    """Edges of at most ``_BINS`` bins that hold all values, rounded to two digits."""
    low = max(least, 1e-9)
    inner = [float(f"{edge:.2g}") for edge in np.geomspace(low, max(greatest, low), _BINS + 1)[1:-1]]
    return np.array(sorted({least, *(edge for edge in inner if least < edge < greatest), greatest}))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"
