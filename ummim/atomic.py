"""Files that are whole or absent."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step: a reader, a kill or a full disk never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
