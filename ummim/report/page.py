"""``ummim report``: one HTML file, whole in itself: no network, no other file, one script of ours."""

import base64
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from ummim.atomic import write_text
from ummim.errors import UserError
from ummim.report import records
from ummim.report.curves import curves
from ummim.report.html import esc
from ummim.report.overview import overview, stamp
from ummim.report.read import Run, read_runs

FILE = "report.html"
_HERE = Path(__file__).parent
_TITLES = {
    "overview": "Runs",
    "curves": "Curves",
    "evaluation": "Evaluation",
    "reconstructions": "Reconstructions",
    "masks": "Masks",
    "health": "Encoder",
    "events": "Faults and checkpoints",
    "recipes": "Recipes",
    "environment": "Environment",
    "commands": "Go on",
}


def write_report(
    folders: Sequence[Path], out: Path | None = None, look: bool = True, shards: str | None = None
) -> Path:
    """Write the report of one or more runs; returns the file.

    Args:
        folders: of the runs; the first one's name stands first and takes the file.
        out: the file; ``report.html`` in the first folder unless given.
        look: load checkpoints and look into their encoders.
        shards: where the runs' shards are now, if they have moved.

    Raises:
        UserError: a folder that is no run's, or an ``out`` that is a folder.
    """
    runs = read_runs(list(folders))
    path = out or runs[0].folder / FILE
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder: name a file, such as {path / FILE}")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}: make it, or name another file")
    write_text(path, page(runs, _sections(runs, look, shards)))
    return path


def page(runs: Sequence[Run], sections: Sequence[str]) -> str:
    """The whole document. Its policy lets a browser run our script, show inlined pictures, and do nothing else."""
    style, script = ((_HERE / name).read_text() for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = esc(", ".join(run.label for run in runs))
    links = "".join(
        f'<a href="#{name}">{esc(text)}</a>'
        for name, text in _TITLES.items()
        if any(part.startswith(f'<section id="{name}">') for part in sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}: ummim report</title><style>{style}</style></head><body>"
        f'<h1>{title}</h1><p class="quiet">ummim report, {stamp(time.time())}</p><nav>{links}</nav>'
        f'{"".join(sections)}<div id="told" hidden></div><script>{script}</script></body></html>\n'
    )


def _sections(runs: Sequence[Run], look: bool, shards: str | None) -> list[str]:
    from ummim.report import views  # torch

    subjects = [views.subject(run, shards) for run in runs]
    parts = [
        overview(runs, time.time()),
        curves(runs),
        records.evaluations(runs),
        views.reconstructions(runs),
        views.masks(subjects),
        views.encoder_health(subjects) if look else "",
        records.events(runs),
        records.recipes(runs),
        records.environments(runs),
        records.commands(runs),
    ]
    return [part for part in parts if part]
