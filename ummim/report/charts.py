"""Line charts as SVG: axes with round numbers, and the values with them for whoever points at a line."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ummim.report.html import COLOURS, esc

MOST = 500  # points of a line that are drawn
NOISY = 40  # points from which a line may get its running mean
FEW = 3  # lines at most, for all their points to be drawn below their running means
_WIDTH, _HEIGHT = 460, 250
_BEYOND = 1e30  # nothing that a run measures is as large: a damaged file, which must not spoil the scale
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 10, 36  # between the axes and the edges

Point = tuple[float, float | None]  # a value of None interrupts the line


@dataclass(frozen=True)
class Line:
    """A line, or dots, in colour number ``colour``."""

    label: str
    colour: int
    points: Sequence[Point]
    dots: bool = False
    thin: bool = False  # an aid to the eye, such as a reference: dashed, and no one points at it


def line_chart(
    lines: Sequence[Line], x_label: str, log: bool = False, from_zero: bool = False, noisy: bool = False, name: str = ""
) -> str:
    """An SVG element, or a line of text where there is no value.

    log: decades upwards, for positive values only. noisy: a long line is its running mean, and what it is the mean of
    is drawn faintly below it, unless there are many lines; rare peaks are cut off at the chart's edge.
    """
    lines = [replace(line, points=[_sane(point) for point in line.points if abs(point[0]) < _BEYOND]) for line in lines]
    drawn = [replace(line, points=thinned(line.points)) for line in lines]
    values = [(x, y) for line in drawn for x, y in line.points if y is not None and (y > 0 or not log)]
    if not values:
        return '<p class="none">no values</p>'
    below, above = list[Line](), list[Line]()
    for line, full in zip(drawn, lines, strict=True):
        if not noisy or len(full.points) < NOISY:
            above.append(line)
            continue
        above.append(replace(line, points=thinned(running_mean(full.points), MOST // 2)))
        if len(lines) <= FEW:
            below.append(line)
    shown = [point for line in above for point in line.points] + [point for line in below for point in _calm(line)]
    frame = Frame.around([(x, y) for x, y in shown if y is not None and (y > 0 or not log)] or values, log, from_zero)
    marks = [
        _axes(frame, x_label),
        *(_line(line, frame, "raw") for line in below),
        *(_line(line, frame) for line in above),
    ]
    label = f"{name}: {number_text(min(y for _, y in values))} to {number_text(max(y for _, y in values))}"
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{esc(label)}" '
        f'data-chart="{esc(_told(drawn, frame, x_label))}">{"".join(marks)}</svg>'
    )


@dataclass(frozen=True)
class Frame:
    """What part of the plane a chart shows."""

    left: float
    right: float
    low: float
    high: float
    log: bool

    @classmethod
    def around(cls, values: Sequence[tuple[float, float]], log: bool, from_zero: bool) -> "Frame":
        left, right = min(x for x, _ in values), max(x for x, _ in values)
        low, high = min(y for _, y in values), max(y for _, y in values)
        if right - left <= 1e-9 * max(abs(left), abs(right), 1e-9):
            room = max(0.5, 1e-6 * abs(left))
            left, right = left - room, right + room
        if log:
            low, high = (low / 1.1, high * 1.1) if high > 1.01 * low else (low / 2, high * 2)
        else:
            low = min(0.0, low) if from_zero else low
            room = 0.05 * (high - low) if high - low > 1e-9 * abs(high) + 1e-30 else 0.1 * abs(high) + 1e-3
            low, high = (low if low == 0 and from_zero else low - room), high + room
        return cls(left, right, low, high, log)

    def x(self, value: float) -> float:
        return _LEFT + (value - self.left) / (self.right - self.left) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        share = min(max(share, 0.0), 1.0)  # a peak beyond the edge ends there
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, some ``about`` of them."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= 0.75 * rough)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from ``low`` to ``high``; where that makes few, also their multiples; else round numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(powers) // 6)
    for times in ((1,), (1, 3), (1, 2, 5)):
        found = [t * 10.0**p for p in powers if p % every == 0 for t in times if low <= t * 10.0**p <= high]
        if len(found) >= 3:
            return found
    return [tick for tick in ticks(low, high) if tick > 0]


def number_text(value: float) -> str:
    """A number for the eye: four digits, with thousands or powers of ten where it is large or small."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "not finite"
    if 1e4 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    text = f"{value:.4g}"
    if "e" in text:
        digits, _, power = text.partition("e")
        return f"{digits}e{int(power)}"
    return text


def thinned(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most about ``most`` of the points: of neighbours the lowest and the highest, so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    size, kept = math.ceil(2 * len(points) / most), []
    for start in range(0, len(points), size):
        group = list(enumerate(points[start : start + size]))
        present = [(i, (x, y)) for i, (x, y) in group if y is not None]
        if present:
            ends = {
                min(present, key=lambda each: each[1][1] or 0)[0],
                max(present, key=lambda each: each[1][1] or 0)[0],
            }
            kept += [points[start + i] for i in sorted(ends)]
        else:
            kept.append(points[start])
    return kept


def running_mean(points: Sequence[Point]) -> list[Point]:
    """At every point the mean of the values around it, a thirtieth of the line to either side; gaps stay."""
    reach, total, count = max(1, len(points) // 30), [0.0], [0]
    for _, y in points:
        total.append(total[-1] + (y or 0.0))
        count.append(count[-1] + (y is not None))
    smooth: list[Point] = []
    for i, (x, y) in enumerate(points):
        near = max(min(reach, i, len(points) - 1 - i), reach // 5)  # less at the ends, where it would lean
        first, last = max(0, i - near), min(len(points), i + near + 1)
        smooth.append((x, None if y is None else (total[last] - total[first]) / (count[last] - count[first])))
    return smooth


def _told(lines: Sequence[Line], frame: Frame, x_label: str) -> str:
    """JSON for the page's script: the values, and the edges: x in the picture, x in the data, y in the picture."""
    edges = [_LEFT, _WIDTH - _RIGHT, frame.left, frame.right, _TOP, _HEIGHT - _BOTTOM]
    told = [
        {
            "label": line.label,
            "colour": line.colour % COLOURS,
            "points": [[_round(x), _round(y)] for x, y in line.points],
        }
        for line in lines
        if not line.thin
    ]
    return json.dumps({"x": x_label, "frame": edges, "lines": told}, separators=(",", ":"))


def _calm(line: Line) -> list[Point]:
    """The line's points with the highest and lowest fiftieth of the values brought in."""
    values = sorted(y for _, y in line.points if y is not None)
    if not values:
        return []
    low, high = values[len(values) // 50], values[-1 - len(values) // 50]
    return [(x, y if y is None else min(max(y, low), high)) for x, y in line.points]


def _axes(frame: Frame, x_label: str) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value in log_ticks(frame.low, frame.high) if frame.log else ticks(frame.low, frame.high):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number_text(value)}</text>')
    for value in ticks(frame.left, frame.right, 6):
        x = frame.x(value)
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{number_text(value)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{right}" y="{_HEIGHT - 4}" text-anchor="end" class="name">{esc(x_label)}</text>')
    return "".join(parts)


def _line(line: Line, frame: Frame, extra: str = "") -> str:
    kind = f"c{line.colour % COLOURS} {extra}{' again' if line.colour >= COLOURS else ''}{' aid' if line.thin else ''}"
    shown = [(x, y if y is not None and (y > 0 or not frame.log) else None) for x, y in line.points]
    places = [None if y is None else (frame.x(x), frame.y(y)) for x, y in shown]
    if line.dots:
        return "".join(f'<circle class="{kind}" cx="{p[0]:.1f}" cy="{p[1]:.1f}" r="3"/>' for p in places if p)
    path, lone = [], []
    for i, place in enumerate(places):
        before, after = (places[j] if 0 <= j < len(places) else None for j in (i - 1, i + 1))
        if place is not None:
            path.append(f"{'L' if before else 'M'}{place[0]:.1f} {place[1]:.1f}")
            if not before and not after:  # between two gaps: a line would not be seen
                lone.append(f'<circle class="{kind}" cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="2.5"/>')
    return f'<path class="{kind}" d="{"".join(path)}"/>{"".join(lone)}'


def _sane(point: Point) -> Point:
    x, y = point
    if y is not None and abs(y) < 1 / _BEYOND:
        return x, 0.0
    return x, y if y is not None and abs(y) < _BEYOND else None


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
