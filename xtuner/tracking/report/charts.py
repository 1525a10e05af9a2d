"""Line charts and histograms as inline SVG in the page's colours, without a library."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from zlib import crc32

from xtuner.tracking.report.read import Series

_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 12, 26
_MAX_POINTS = 600  # per drawn line; more than a screen resolves
_SMOOTH_FROM = 40  # points; shorter series are drawn without a running mean
_LOG_FROM = 10  # minimum ratio of highest to lowest value for a logarithmic axis
_OUTLIERS = 0.005  # share of points at either end that may lie beyond the axis


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: For the legend and the tooltip.
        series: Its points.
        role: Its colour: 'main' or 'second'.
        smooth: Whether to draw a running mean over the points, which are then faint.
    """

    name: str
    series: Series
    role: str = 'main'
    smooth: bool = False


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels, linearly or logarithmically."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Returns the pixel of a value."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / ((high - low) or 1) * (self.end - self.start)


def line_chart(
    lines: Sequence[Line], *, label: str, show: Callable[[float], str], tick: Callable[[float], str] | None = None,
    width: int = 1000, height: int = 280,
    log: bool = False, from_zero: bool = False,
) -> str:  # fmt: skip
    """Returns an SVG of one or several quantities over the steps.

    Args:
        lines: The lines to draw; empty ones are skipped.
        label: Description for screen readers.
        show: Formats a value.
        tick: Formats a tick of the value axis; None: as `show`.
        width: Width in drawing coordinates, which scale with the page.
        height: Height in drawing coordinates.
        log: Whether the value axis is logarithmic, if all values are positive.
        from_zero: Whether the value axis starts at 0.
    """
    lines = [line for line in lines if len(line.series)]
    if not lines:
        return '<p class="none">nothing was recorded</p>'
    values = [value for line in lines for value in line.series.values]
    log = log and min(values) > 0 and max(values) > _LOG_FROM * min(values)
    low, high = _bounds(lines, log=log, from_zero=from_zero)
    first = min(line.series.steps[0] for line in lines)
    last = max(line.series.steps[-1] for line in lines)
    x = Axis(first, last if last > first else first + 1, _LEFT, width - _RIGHT)
    y = Axis(low, high, height - _BOTTOM, _TOP, log)
    parts = [_grid(x, y, tick or show, width, height)]
    beyond = sum(not low <= value <= high for value in values)
    clip = f'clip-{crc32(repr((label, width, height)).encode())}'
    parts.append(
        f'<clipPath id="{clip}"><rect x="{_LEFT - 5}" y="{_TOP - 5}" width="{width - _LEFT - _RIGHT + 10}" '
        f'height="{height - _TOP - _BOTTOM + 10}"/></clipPath><g clip-path="url(#{clip})">'
    )
    parts += [_drawn(line, x, y) for line in lines]
    parts.append('</g>')
    parts += [_broken(line.series, x, height) for line in lines]
    if beyond:
        parts.append(
            f'<text class="tick" x="{width - _RIGHT}" y="{_TOP + 2}" text-anchor="end">'
            f'{beyond} point{"s" * (beyond > 1)} beyond the axis</text>'
        )
    points = escape(json.dumps(_readings(lines, x, y, show)), quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label, quote=True)}" '
        f'data-points="{points}">{"".join(parts)}'
        f'<line class="cross" y1="{_TOP}" y2="{height - _BOTTOM}"/><circle class="spot" r="4"/></svg>'
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred running mean over about a thirtieth of the points, without lag."""
    half = max(1, len(values) // 60)
    sums = [0.0, *accumulate(values)]
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `_MAX_POINTS` points: the minimum and maximum of each segment, so that no peak is lost."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (_MAX_POINTS / 2))
    kept = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = [min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])]
        kept += sorted(ends)
    return kept


def _bounds(lines: Sequence[Line], *, log: bool, from_zero: bool) -> tuple[float, float]:
    """Bounds of the value axis: all but a few outliers, plus a margin."""
    extremes = []
    for line in lines:
        values = sorted(line.series.values)
        cut = 0 if log else int(len(values) * _OUTLIERS)
        extremes += [values[cut], values[-1 - cut]]
    low, high = min(extremes), max(extremes)
    if from_zero:
        return 0.0, high * 1.08 or 1.0
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return (low / 2, high * 2) if log else (low - pad, high + pad)
    if log:
        margin = (high / low) ** 0.06
        return low / margin, high * margin
    return low - (high - low) * 0.06, high + (high - low) * 0.06


def _drawn(line: Line, x: Axis, y: Axis) -> str:
    steps, values = line.series.steps, line.series.values
    dots = len(steps) <= _SMOOTH_FROM
    raw = thinned([(x(s), y(v)) for s, v in zip(steps, values, strict=True)])
    marks = (
        ''.join(f'<circle class="dot {line.role}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in raw) if dots else ''
    )
    if not line.smooth or dots:
        return f'<path class="line {line.role}" d="{_path(raw)}"/>{marks}'
    mean = thinned([(x(s), y(v)) for s, v in zip(steps, smoothed(values), strict=True)])
    behind = f'<path class="faint {line.role}" d="{_path(raw)}"/>'
    if len(steps) > _MAX_POINTS:
        behind = f'<path class="band {line.role}" d="{_band(raw)}"/>'
    return f'{behind}<path class="line {line.role}" d="{_path(mean)}"/>'


def _band(points: Sequence[tuple[float, float]]) -> str:
    """The area between the maxima and minima of the segments that `thinned` kept."""
    pairs = list(zip(points[::2], points[1::2], strict=False))
    upper = [(a[0], min(a[1], b[1])) for a, b in pairs]
    lower = [(a[0], max(a[1], b[1])) for a, b in pairs]
    return f'{_path(upper + lower[::-1])}Z'


def _path(points: Sequence[tuple[float, float]]) -> str:
    return 'M' + 'L'.join(f'{a:.1f} {b:.1f}' for a, b in points)


def _broken(series: Series, x: Axis, height: int) -> str:
    """Ticks at the bottom for steps with a non-finite value."""
    return ''.join(
        f'<path class="broken" d="M{x(step):.1f} {height - _BOTTOM}v-9"><title>step {step}: not finite</title></path>'
        for step in series.broken[:_MAX_POINTS]
    )


def _grid(x: Axis, y: Axis, show: Callable[[float], str], width: int, height: int) -> str:
    parts = []
    for value in log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high, 4):
        at = y(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{width - _RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(show(value))}</text>'
        )
    for value in ticks(x.low, x.high, max(3, width // 120)):
        if value == int(value):
            parts.append(
                f'<text class="tick" x="{x(value):.1f}" y="{height - 6}" text-anchor="middle">{int(value):,}</text>'
            )
    return ''.join(parts)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between two values, about `count` of them.

    Example:
        ticks(0.3, 2.2, 4)  ->  [0.5, 1.0, 1.5, 2.0]
    """
    raw = (high - low) / max(1, count)
    size = 10 ** math.floor(math.log10(raw)) if raw > 0 else 1
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two positive values; only powers if there would be too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = [10**p * factor for p in powers for factor in (1, 2, 5) if low <= 10**p * factor <= high]
    return few if len(few) <= 6 else [v for v in few if f'{v:e}'.startswith('1.0')]


def _readings(lines: Sequence[Line], x: Axis, y: Axis, show: Callable[[float], str]) -> list[list[object]]:
    """Tooltip data: x, y and text of points, evenly thinned."""
    readings = []
    for line in lines:
        series = line.series
        every = math.ceil(len(series) / _MAX_POINTS)
        main = smoothed(series.values) if line.smooth and len(series) > _SMOOTH_FROM else series.values
        for i in range(0, len(series), every):
            at = min(max(y(main[i]), _TOP), y.start)
            text = f'step {series.steps[i]:,} · {line.name} {show(series.values[i])}'
            readings.append([round(x(series.steps[i]), 1), round(at, 1), text])
    return readings


def histogram(edges: Sequence[float], counts: Sequence[int], *, label: str, width: int = 480, height: int = 150) -> str:
    """Returns an SVG of counts between edges, `len(edges) == len(counts) + 1`."""
    most = max(counts, default=0)
    if not most:
        return ''
    inner, base = width - 16, height - 22
    bar = inner / len(counts)
    parts = []
    for i, count in enumerate(counts):
        tall = count / most * (base - 8)
        title = f'{edges[i]:,.0f} to {edges[i + 1]:,.0f}: {count:,}'
        parts.append(
            f'<rect class="bar" x="{8 + i * bar + 1:.1f}" y="{base - tall:.1f}" width="{bar - 2:.1f}" '
            f'height="{max(tall, 1 if count else 0):.1f}" rx="1.5"><title>{title}</title></rect>'
        )
    for value, at, anchor in ((edges[0], 8, 'start'), (edges[-1], width - 8, 'end')):
        parts.append(f'<text class="tick" x="{at}" y="{height - 6}" text-anchor="{anchor}">{value:,.0f}</text>')
    text = escape(label, quote=True)
    return (
        f'<svg class="histogram" viewBox="0 0 {width} {height}" role="img" aria-label="{text}">{"".join(parts)}</svg>'
    )
