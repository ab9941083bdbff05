"""The curves of ``metrics.jsonl``: a chart for each metric, all runs in it."""

from collections.abc import Sequence
from typing import NamedTuple

from ummim.report.charts import FEW, Line, Point, line_chart
from ummim.report.html import esc, legend, note, section
from ummim.report.read import Run


class Style(NamedTuple):
    """How a metric is drawn."""

    title: str
    from_zero: bool = False
    noisy: bool = False
    scales: bool = False  # linear and logarithmic, to choose from


TRAINING = {
    "loss": Style("Loss", noisy=True, scales=True),
    "lr": Style("Learning rate", from_zero=True),
    "grad_norm": Style("Gradient norm", from_zero=True, noisy=True, scales=True),
    "train_top1": Style("Top-1 on the training batch (%)", noisy=True),
}
EVALUATION = {
    "val_loss": Style("Validation loss", scales=True),
    "val_top1": Style("Validation top-1 (%)"),
    "val_top5": Style("Validation top-5 (%)"),
    "knn_top1": Style("k-NN top-1 (%)"),
}
MACHINE = {
    "images_per_second": Style("Images per second, all ranks", from_zero=True, noisy=True),
    "data_wait": Style("Waiting for data, share of the time", from_zero=True, noisy=True),
    "peak_memory_mib": Style("Peak memory of rank 0 (MiB)", from_zero=True),
}
_ELSEWHERE = ("step", "epoch", "samples", "data_faults", "bad_steps")  # axes, and what sections of their own tell


def curves(runs: Sequence[Run]) -> str:
    """The section with all charts."""
    if not any(run.metrics for run in runs):
        return section("curves", "Curves", '<p class="none">No metrics yet.</p>')
    present = list(dict.fromkeys(key for run in runs for key in run.metric_names()))
    known = {**TRAINING, **EVALUATION, **MACHINE}
    others = {key: Style(key) for key in present if key not in known and key not in _ELSEWHERE}
    wanted = {**TRAINING, **EVALUATION, **others, **MACHINE}
    charts = [chart(runs, key, style) for key, style in wanted.items() if key in present]
    hint = f"Bold: running means; faint, of up to {FEW} runs: as logged, rare peaks cut off at the edge. "
    hint += "Point at a chart to read its values."
    names = legend([run.label for run in runs])
    return section("curves", "Curves", note(hint), names, f'<div class="charts">{"".join(charts)}</div>')


def chart(runs: Sequence[Run], key: str, style: Style) -> str:
    """One metric: over epochs where all runs tell them, else over optimizer steps."""
    by_epoch = all(sample.epoch is not None for run in runs for sample in run.series(key))
    x_label = "epoch" if by_epoch else "step"
    lines = [Line(run.label, number, points(run, key, by_epoch)) for number, run in enumerate(runs)]
    lines = [line for line in lines if line.points]
    linear = line_chart(lines, x_label, False, style.from_zero, style.noisy, style.title)
    caption = f"<h3>{esc(style.title)}</h3>"
    values = [y for line in lines for _, y in line.points if y is not None]
    lost = sum(len(line.points) for line in lines) - len(values)
    told = note(f"No number at {lost} logged steps: not finite, or left out.", bad=True) if lost else ""
    if not (style.scales and values and min(values) > 0):
        return f"<figure><figcaption>{caption}</figcaption>{linear}{told}</figure>"
    logarithmic = line_chart(lines, x_label, True, style.from_zero, style.noisy, style.title)
    choice = "".join(
        f'<label><input type="radio" name="scale-{esc(key)}"{more}> {word}</label>'
        for word, more in (("linear", " checked"), ("log", ' class="log"'))
    )
    return (
        f'<figure><figcaption>{caption}<span class="scale">{choice}</span></figcaption>'
        f'<div class="linear">{linear}</div><div class="logarithmic">{logarithmic}</div>{told}</figure>'
    )


def points(run: Run, key: str, by_epoch: bool) -> list[Point]:
    """A run's metric as points of a line."""
    return [((s.epoch or 0.0) if by_epoch else s.step, s.value) for s in run.series(key)]
