"""Draws the results of a demo as a picture in the style of a report: numbers, loss curves, answers."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PICTURE = 'demo.png'
# The report's colours (xtuner/tracking/report/page.css).
_PAGE, _CARD, _INK, _SOFT, _HAIR, _WASH, _MAIN = (
    '#f7f7f5', '#ffffff', '#1b1d22', '#5f646d', '#e5e5e1', '#f1f1ee', '#3257c8')  # fmt: skip
_WIDTH, _MARGIN, _GAP = 11.0, 0.35, 0.14  # inches, as all below
_HEAD, _TILE, _CHART, _LINE = 0.85, 0.82, 2.6, 0.17
_SMOOTH = 9  # steps over which the bold line is averaged
_MAX_ROWS = 6
_FIRST_CJK = '\u2e80'  # matplotlib's font lacks the characters from here on


@dataclass(frozen=True)
class Picture:
    """The content of the picture.

    Attributes:
        title: The heading.
        subtitle: The line below the heading.
        tiles: Numbers, each with a name, a value and a note.
        runs: Loss curves, each with a title and the work directory of a run.
        answers: Rows of a question, the answer before and the answer after. Rows with characters that the font lacks
            (Chinese) are skipped.
    """

    title: str
    subtitle: str
    tiles: Sequence[tuple[str, str, str]]
    runs: Sequence[tuple[str, Path]]
    answers: Sequence[tuple[str, str, str]]


def draw(picture: Picture, out: Path) -> Path:
    """Writes a PNG and returns its path."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    shown = [row for row in picture.answers if all(char < _FIRST_CJK for text in row for char in text)][:_MAX_ROWS]
    rows = [(_wrapped(question, 28), _wrapped(before), _wrapped(after)) for question, before, after in shown]
    heights = [0.3 + _LINE * max(text.count('\n') + 1 for text in row) for row in rows]
    height = _HEAD + _TILE + _CHART + sum(heights) + 2 * _MARGIN + (len(rows) + 1) * _GAP
    figure = pyplot.figure(figsize=(_WIDTH, height), facecolor=_PAGE)
    page = _Page(figure, height)
    page.text(_MARGIN, 0.55, picture.title, size=20, weight='bold')
    page.text(_MARGIN, 0.85, picture.subtitle, size=10, color=_SOFT)
    top = _MARGIN + _HEAD - 0.1
    for (left, width), (name, value, note) in zip(_columns(len(picture.tiles)), picture.tiles, strict=True):
        page.card(left, top, width, _TILE)
        page.text(left + 0.16, top + 0.25, name, size=9, color=_SOFT)
        page.text(left + 0.16, top + 0.5, value, size=15, weight='bold')
        page.text(left + 0.16, top + 0.7, note, size=9, color=_SOFT)
    top += _TILE + _GAP
    for (left, width), (title, run) in zip(_columns(len(picture.runs)), picture.runs, strict=True):
        page.curve(left, top, width, _CHART, title, *_losses(run))
    top += _CHART + _GAP
    for row, row_height in zip(rows, heights, strict=True):
        page.answer(top, row_height, *row)
        top += row_height + _GAP
    figure.savefig(out, dpi=110, facecolor=_PAGE)
    pyplot.close(figure)
    return out


class _Page:
    """A figure with coordinates in inches from the upper left corner."""

    def __init__(self, figure: Any, height: float) -> None:
        self._figure, self._height = figure, height

    def text(self, x: float, y: float, content: str, *, color: str = _INK, **style: Any) -> None:
        """Writes a text literally ($ starts no formula), with its last line at `y`."""
        self._figure.text(x / _WIDTH, 1 - y / self._height, content.replace('$', r'\$'), color=color, **style)

    def card(self, x: float, y: float, width: float, height: float, *, color: str = _CARD, edge: str = _HAIR) -> None:
        """Draws a box with round corners."""
        from matplotlib.patches import FancyBboxPatch
        from matplotlib.transforms import Affine2D

        inches = Affine2D().scale(1, -1).translate(0, self._height) + self._figure.dpi_scale_trans
        shape = 'round,pad=0,rounding_size=0.1'
        box = FancyBboxPatch((x, y), width, height, boxstyle=shape, transform=inches, facecolor=color, edgecolor=edge,
                             linewidth=0.8, zorder=-1)  # fmt: skip
        self._figure.add_artist(box)

    def curve(self, x: float, y: float, width: float, height: float, title: str, steps: Any, losses: Any) -> None:
        """Draws the loss of each step in a light colour, and its moving average."""
        self.card(x, y, width, height)
        self.text(x + 0.16, y + 0.28, title, size=10, weight='bold')
        self.text(x + width - 0.16, y + 0.28, 'loss, nats per token', size=8.5, color=_SOFT, ha='right')
        left, bottom = (x + 0.55) / _WIDTH, 1 - (y + height - 0.35) / self._height
        axes = self._figure.add_axes((left, bottom, (width - 0.75) / _WIDTH, (height - 0.8) / self._height))
        axes.plot(steps, losses, color=_MAIN, linewidth=0.8, alpha=0.3)
        axes.plot(steps, _smoothed(losses), color=_MAIN, linewidth=1.8)
        axes.set_ylim(bottom=0)
        axes.set_facecolor(_CARD)
        axes.grid(axis='y', color=_HAIR, linewidth=0.8)
        axes.tick_params(colors=_SOFT, labelsize=8.5, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)

    def answer(self, y: float, height: float, question: str, before: str, after: str) -> None:
        """Draws a question with the answers before and after."""
        whole = _WIDTH - 2 * _MARGIN
        self.card(_MARGIN, y, whole, height)
        self.text(_MARGIN + 0.16, y + 0.18, question, size=10, weight='bold', va='top', linespacing=1.25)
        for left, label, answer, edge in ((0.265, 'before', before, _WASH), (0.63, 'after', after, _MAIN)):
            x, width = _MARGIN + left * whole, 0.355 * whole
            self.card(x, y + 0.08, width, height - 0.16, color=_WASH, edge=edge)
            self.text(x + 0.12, y + 0.18, label, size=8.5, color=_SOFT, va='top')
            self.text(x + 0.62, y + 0.18, answer, size=9, va='top', linespacing=1.25)


def _columns(count: int) -> list[tuple[float, float]]:
    """Left edge and width of each of some columns."""
    width = (_WIDTH - 2 * _MARGIN - (count - 1) * _GAP) / max(1, count)
    return [(_MARGIN + i * (width + _GAP), width) for i in range(count)]


def _wrapped(text: str, width: int = 40) -> str:
    lines = textwrap.wrap(' '.join(text.split()), width) or ['']
    return '\n'.join(lines[:3]) + (' ...' if len(lines) > 3 else '')


def _smoothed(losses: Sequence[float]) -> list[float]:
    half = min(_SMOOTH, max(1, len(losses) // 5)) // 2
    parts = [losses[max(0, i - half) : i + half + 1] for i in range(len(losses))]
    return [sum(part) / len(part) for part in parts]


def first_and_last_loss(run: Path) -> tuple[float, float]:
    """The loss of a run's first step and of its last."""
    losses = _losses(run)[1]
    return losses[0], losses[-1]


def _losses(run: Path) -> tuple[list[int], list[float]]:
    lines = (run / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    metrics = [m for m in map(json.loads, lines) if 'loss' in m]
    return [m['step'] for m in metrics], [m['loss'] for m in metrics]
