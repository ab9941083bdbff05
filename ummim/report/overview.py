"""What stands first on the page: the runs in a table, and how far each has come."""

import statistics
import time
from collections.abc import Sequence

from ummim.report.charts import number_text
from ummim.report.html import esc, key, named, note, section, table
from ummim.report.read import Run, number

RECENT = 50  # records of a run's rate


def overview(runs: Sequence[Run], now: float) -> str:
    """The section; ``now`` in seconds since 1970."""
    rows, parts = [], []
    for i, run in enumerate(runs):
        loss, rate, memory = run.last("loss"), recent_rate(run), run.last("peak_memory_mib")
        numbers = ["" if value is None else number_text(value) for value in (loss, rate, memory)]
        name = f"<b>{named(i, run.label)}</b>"
        rows.append([name, esc(what(run)), esc(progress(run, now)), *numbers, esc(best(run))])
    header = ["Run", "What", "Progress", "Loss", "Images/s", "Memory (MiB)", "Best accuracy"]
    width = len(header) if any(row[-1] for row in rows) else len(header) - 1
    parts.append(table(header[:width], [row[:width] for row in rows], numbers=(3, 4, 5)))
    for i, run in enumerate(runs):
        about = run.recipe.get("description")
        parts.append(f"<p>{key(i)}<code>{esc(run.folder)}</code>{f': {esc(about)}' if about else ''}</p>")
        published = run.recipe.get("published")
        if isinstance(published, dict) and number(published.get("top1")) is not None:
            told = f"published by {published.get('source') or 'others'} for this recipe, not a result of this run"
            parts.append(note(f"{published['top1']}% top-1 on ImageNet-1K after fine-tuning: {told}."))
        parts += [note(f"{name}: {text}.") for name, text in run.notes.items()]
    return section("overview", "Runs", *parts)


def what(run: Run) -> str:
    """Method and encoder of a run, or the protocol of an evaluation."""
    for name, word in (("method", "name"), ("classify", "protocol")):
        part = run.recipe.get(name)
        if isinstance(part, dict):
            encoder = part.get("encoder")
            kind = encoder.get("kind") if isinstance(encoder, dict) else None
            head = str(part.get(word, "")) or name
            return f"{'classification, ' if name == 'classify' else ''}{head}{f' on {kind}' if kind else ''}"
    return ""


def progress(run: Run, now: float) -> str:
    """Where a run stands, and whether anything happens."""
    step, epoch, stop = run.last("step"), run.last("epoch"), run.stop_step()
    if step is None:
        return "no step logged"
    text = f"step {step:,.0f}{f' of {stop:,}' if stop else ''}"
    text += f", epoch {epoch:.2f}" if epoch is not None else ""
    if stop and step >= stop:
        return f"{text}: ended"
    if run.written is not None:
        text += f"; last line {ago(now - run.written)} ago"
    rate, batch = recent_rate(run), number(run.recipe.get("global_batch"))
    if stop and rate and batch:
        text += f"; {ago((stop - step) * batch / rate)} of training left at the recent rate"
    return text


def recent_rate(run: Run) -> float | None:
    """The median of the newest images per second."""
    rates = [sample.value for sample in run.series("images_per_second")[-RECENT:] if sample.value]
    return statistics.median(rates) if rates else None


def best(run: Run) -> str:
    """The highest accuracies on held-out images, each with its epoch."""
    found = []
    for name in (name for name in run.metric_names() if "top1" in name and not name.startswith("train")):
        values = [sample for sample in run.series(name) if sample.value is not None]
        if values:
            top = max(values, key=lambda sample: sample.value or 0)
            where = f"epoch {top.epoch:.0f}" if top.epoch is not None else f"step {top.step:.0f}"
            found.append(f"{name} {number_text(top.value or 0)} ({where})")
    return ", ".join(found)


def ago(seconds: float) -> str:
    """A time span in its largest fitting unit."""
    seconds = max(0.0, seconds)
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def stamp(now: float) -> str:
    """A moment, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
