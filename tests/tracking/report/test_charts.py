"""The drawn lines: where points come to lie, what is left out and said to be."""

from __future__ import annotations

import json
import re
from html import unescape
from xml.etree import ElementTree

import pytest

from xtuner.tracking.report.charts import Axis, Line, histogram, line_chart, log_ticks, smoothed, thinned, ticks
from xtuner.tracking.report.read import Series


def chart(values: list[float], **options: object) -> ElementTree.Element:
    series = Series(list(range(1, len(values) + 1)), values)
    svg = line_chart([Line('loss', series, smooth=True)], label='a <b>', show=lambda v: f'{v:g}', **options)  # type: ignore[arg-type]
    return ElementTree.fromstring(svg)  # well-formed, or this fails


def path_points(svg: ElementTree.Element, kind: str) -> list[tuple[float, float]]:
    path = next(e for e in svg.iter('path') if e.get('class', '').startswith(kind))
    return [(float(a), float(b)) for a, b in re.findall(r'([\d.-]+) ([\d.-]+)', path.get('d', ''))]


def test_points_lie_where_their_values_are() -> None:
    svg = chart([4.0, 2.0, 3.0], width=1000, height=280)
    (x1, y1), (x2, y2), (x3, y3) = path_points(svg, 'line main')
    assert (x1, x3) == (54, 986)
    assert x2 == pytest.approx((x1 + x3) / 2, abs=0.1)
    assert y1 < y3 < y2  # up is more
    assert y3 == pytest.approx((y1 + y2) / 2, abs=0.1)


def test_a_logarithmic_axis_has_equal_steps_for_equal_ratios() -> None:
    axis = Axis(0.1, 1000, 0, 400, log=True)
    assert [axis(v) for v in (0.1, 1, 10, 100, 1000)] == pytest.approx([0, 100, 200, 300, 400])


def test_readings_are_the_measured_values() -> None:
    svg = chart([float(i) for i in range(100)])
    points = json.loads(unescape(svg.get('data-points', '')))
    assert len(points) == 100
    assert points[41][2] == 'step 42 · loss 41'


def test_outliers_are_counted() -> None:
    values = [1.0 + 0.001 * (i % 7) for i in range(1000)]
    values[500] = 1e6
    text = ''.join(chart(values).itertext())
    assert '1 point beyond the axis' in text
    assert 'beyond' not in ''.join(chart(values, log=True).itertext())


def test_steps_without_a_number_are_marked() -> None:
    series = Series([1, 3], [1.0, 2.0], broken=[2])
    svg = line_chart([Line('loss', series)], label='x', show=str)
    assert svg.count('class="broken"') == 1
    assert 'step 2: not finite' in svg


def test_nothing_recorded_is_said() -> None:
    assert 'nothing was recorded' in line_chart([Line('x', Series())], label='x', show=str)


def test_a_single_point_and_a_constant_are_drawn() -> None:
    for values in ([3.0], [2.0] * 50, [0.0, 0.0]):
        assert path_points(chart(values), 'line main')


def test_smoothing_keeps_a_constant_and_does_not_lag() -> None:
    assert smoothed([2.0] * 90) == pytest.approx([2.0] * 90)
    straight = [float(i) for i in range(300)]
    assert smoothed(straight)[150] == pytest.approx(150)


def test_thinning_keeps_the_peaks() -> None:
    points = [(float(i), 0.0) for i in range(10_000)]
    points[1234] = (1234.0, 9.0)
    points[7777] = (7777.0, -9.0)
    kept = thinned(points)
    assert len(kept) <= 620
    assert {points[1234], points[7777]} <= set(kept)


def test_ticks_are_round() -> None:
    assert ticks(0.3, 2.2, 4) == [0.5, 1.0, 1.5, 2.0]
    assert ticks(0, 100, 4) == [0, 25, 50, 75, 100]
    assert log_ticks(0.2, 3) == pytest.approx([0.2, 0.5, 1, 2])
    assert log_ticks(1e-3, 1e3) == pytest.approx([1e-3, 1e-2, 0.1, 1, 10, 100, 1000])


def test_histogram_bars_are_as_high_as_their_counts() -> None:
    svg = ElementTree.fromstring(histogram([0, 10, 20, 30], [4, 0, 2], label='x'))
    heights = [float(bar.get('height', 0)) for bar in svg.iter('rect')]
    assert heights[0] == pytest.approx(2 * heights[2], abs=0.2)
    assert heights[1] == 0


def test_ids_are_the_same_in_every_process() -> None:
    """Python's own `hash()` is not, so the same run would give another page each time."""
    svg = line_chart([Line('loss', Series([1, 2], [3.0, 2.0]))], label='loss', show=str, width=560, height=200)
    assert re.findall(r'id="(clip-\d+)"', svg) == ['clip-1222577867']
