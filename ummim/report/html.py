"""Pieces of HTML. What comes from a run's files goes through ``esc``, without exception."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

COLOURS = 6  # of the page's style; further runs have them again, dashed


def esc(value: Any) -> str:
    """Any value as text that is safe in an element and in a quoted attribute, and in UTF-8."""
    return escape(str(value).encode(errors="replace").decode())


def key(number: int) -> str:
    """The mark of run ``number``: a square in its colour."""
    again = " again" if number >= COLOURS else ""
    return f'<span class="c{number % COLOURS}"><span class="key{again}"></span></span>'


def named(number: int, label: str) -> str:
    """A run's mark and name."""
    return f"{key(number)}{esc(label)}"


def heading(number: int, label: str) -> str:
    """The same above what tells of this run alone."""
    return f"<h3>{named(number, label)}</h3>"


def legend(labels: Sequence[str]) -> str:
    """All marks and names in a row; nothing for a single run."""
    marks = "".join(f"<span>{named(number, label)}</span>" for number, label in enumerate(labels))
    return f'<p class="legend">{marks}</p>' if len(labels) > 1 else ""


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page that its list of contents leads to."""
    return f'<section id="{name}"><h2>{esc(title)}</h2>{"".join(parts)}</section>'


def note(text: str, bad: bool = False) -> str:
    """A quiet sentence."""
    return f'<p class="quiet{" bad" if bad else ""}">{esc(text)}</p>'


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), marked: Sequence[int] = ()
) -> str:
    """A table of cells that are HTML already. numbers: columns set to the right. marked: rows that stand out."""

    def cells(row: Sequence[str], tag: str) -> str:
        kinds = [' class="number"' if i in numbers else "" for i in range(len(row))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "".join(
        f"<tr{' class=differs' if i in marked else ''}>{cells(row, 'td')}</tr>" for i, row in enumerate(rows)
    )
    return f'<div class="wide"><table><thead><tr>{cells(header, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def size_text(size: float) -> str:
    """Bytes for the eye, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
