"""Charts: round numbers on the axes, no peak lost, gaps where nothing was measured."""

import json
import math
import re
from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ummim.report.charts import (
    MOST,
    Line,
    Point,
    line_chart,
    log_ticks,
    number_text,
    running_mean,
    thinned,
    ticks,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)


def path_of(svg: str) -> str:
    found = re.search(r' d="([^"]*)"', svg)
    assert found is not None
    return found[1]


@given(st.lists(st.tuples(FINITE, st.none() | FINITE), max_size=30), st.booleans(), st.booleans(), st.booleans())
def test_any_numbers_make_a_chart(points: list[Point], log: bool, from_zero: bool, noisy: bool) -> None:
    svg = line_chart([Line("a", 0, points)], "step", log, from_zero, noisy)
    assert "nan" not in svg.replace("role=", "") and "inf" not in svg
    if "<svg" in svg:
        heights = [float(y) for y in re.findall(r"[ML][\d.e+-]+ ([\d.e+-]+)", path_of(svg))]
        assert all(0 <= y <= 250 for y in heights)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 40, [0, 10, 20, 30, 40]), (0.45, 0.71, [0.45, 0.5, 0.55, 0.6, 0.65, 0.7])],
)
def test_ticks_are_round_and_within(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.005, 200, [0.01, 0.1, 1, 10, 100]),
        (0.4, 20, [1, 3, 10]),
        (0.45, 0.71, [0.45, 0.5, 0.55, 0.6, 0.65, 0.7]),
    ],
)
def test_log_ticks_are_powers_of_ten_where_they_are_enough(low: float, high: float, expected: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(expected)


def test_thinning_keeps_ends_peaks_and_gaps() -> None:
    points: list[Point] = [(float(i), math.sin(i / 50)) for i in range(20_000)]
    points[7777] = (7777.0, 9.0)
    points[12_000:13_000] = [(float(i), None) for i in range(12_000, 13_000)]
    few = thinned(points)
    assert len(few) <= MOST + 2
    assert (7777.0, 9.0) in few
    assert any(y is None for _, y in few)
    assert few == sorted(few, key=lambda point: point[0])
    assert thinned(points[:MOST]) == points[:MOST]


def test_a_gap_interrupts_the_line_and_a_lone_value_is_a_dot() -> None:
    values = [1.0, 2.0, None, 3.0, None, 2.0, 1.0]
    svg = line_chart([Line("a", 0, [(float(i), y) for i, y in enumerate(values)])], "step")
    assert path_of(svg).count("M") == 3
    assert svg.count("<circle") == 1


def test_a_value_that_nothing_measures_does_not_spoil_the_scale() -> None:
    svg = line_chart([Line("a", 0, [(1, 1.0), (2, 1e300), (3, 2.0), (1e300, 5.0)])], "step", name="Loss")
    assert 'aria-label="Loss: 1 to 2"' in svg


def test_a_rare_peak_does_not_spoil_a_noisy_lines_scale_and_is_told() -> None:
    points: list[Point] = [(float(i), 1 + i % 7 / 10) for i in range(1000)]
    points[600] = (600.0, 500.0)
    svg = line_chart([Line("a", 0, points)], "step", noisy=True, name="Loss")
    told = [float(text.replace(",", "")) for text in re.findall(r'text-anchor="end">([\d.,]+)<', svg)]
    assert told and max(told) < 30  # the running mean near the peak is about 10
    assert "[600.0,500.0]" in unescape(svg)
    assert "Loss: 1 to 500" in svg


def test_many_noisy_lines_are_their_running_means_alone() -> None:
    lines = [Line(str(n), n, [(float(i), i % 7 + n) for i in range(100)]) for n in range(4)]
    assert line_chart(lines[:3], "step", noisy=True).count("<path") == 6
    assert line_chart(lines, "step", noisy=True).count("<path") == 4


def test_a_log_chart_leaves_out_what_has_no_logarithm() -> None:
    svg = line_chart([Line("a", 0, [(1, 0.0), (2, 1.0), (3, 10.0), (4, -1.0)])], "step", log=True, name="x")
    assert path_of(svg).count("L") == 1
    assert line_chart([Line("a", 0, [(1, 0.0)])], "step", log=True) == '<p class="none">no values</p>'


def test_constant_values_and_a_single_one_have_a_scale() -> None:
    for points in ([(1.0, 5.0)], [(1.0, 5.0), (2.0, 5.0)], [(0.0, 0.0)]):
        assert "<svg" in line_chart([Line("a", 0, points)], "step")


def test_the_values_are_with_the_chart_for_the_script() -> None:
    svg = line_chart([Line('<run> & "co"', 7, [(1, 0.123456789), (2, None)])], "step")
    found = re.search(r'data-chart="([^"]*)"', svg)
    assert found is not None
    (line,) = json.loads(unescape(found[1]))["lines"]
    assert line == {"label": '<run> & "co"', "colour": 1, "points": [[1, 0.12346], [2, None]]}
    assert "<run>" not in svg
    assert "again" in svg  # the seventh colour is the first one, dashed


def test_a_running_mean_keeps_a_straight_line_and_levels_noise() -> None:
    straight = [(float(i), 2.0 * i) for i in range(100)]
    assert [y for _, y in running_mean(straight)] == pytest.approx([y for _, y in straight])
    noisy = [(float(i), float(i % 2)) for i in range(100)]
    assert all(y is not None and 0.3 < y < 0.7 for _, y in running_mean(noisy)[5:-5])
    gap: list[Point] = [(0.0, 1.0), (1.0, None), (2.0, 3.0)]
    assert running_mean(gap)[1] == (1.0, None)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (12345, "12,345"), (1e-5, "1e-5"), (2.5e9, "2.5e9"), (1 / 3, "0.3333")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number_text(value) == text
