"""Draws what a demo did: both loss curves, and the answers before and after, as one picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

PICTURE = 'demo.png'
_WIDTH_INCHES, _HEIGHT_INCHES = 11, 6.2
_MOST_ROWS = 6


def draw(base_run: Path, tuned_run: Path, answers: Sequence[Sequence[str]], out: Path) -> Path:
    """Writes a PNG and returns its path.

    Args:
        base_run: Work folder of the first training.
        tuned_run: Work folder of the second.
        answers: Rows of question, base's, tuned and merged answer. Those that the picture's font cannot show, such as
            Chinese ones, are left out of the picture.
        out: Where to write.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplot_mosaic(
        [['base', 'tuned'], ['answers', 'answers']],
        figsize=(_WIDTH_INCHES, _HEIGHT_INCHES),
        gridspec_kw={'height_ratios': [3, 2]},
    )
    for name, run, title in (
        ('base', base_run, 'a tiny InternLM from scratch, all weights'),
        ('tuned', tuned_run, 'then QLoRA: 4-bit base, rank-64 adapter'),
    ):
        steps, losses = _losses(run)
        axes[name].plot(steps, losses, color='#2a6f97', linewidth=1.2)
        axes[name].set(title=title, xlabel='step', ylabel='loss a token (nats)', yscale='log')
        axes[name].grid(alpha=0.3, which='both')
    rows = [row[:3] for row in answers if all(text.isascii() for text in row[:3])][:_MOST_ROWS]
    axes['answers'].axis('off')
    table = axes['answers'].table(
        cellText=rows,
        colLabels=['question', 'base', 'tuned'],
        loc='center',
        cellLoc='left',
        colWidths=[0.21, 0.42, 0.37],
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.scale(1, 1.35)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return out


def _losses(run: Path) -> tuple[list[int], list[float]]:
    lines = (run / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    metrics = [m for m in map(json.loads, lines) if 'loss' in m]
    return [m['step'] for m in metrics], [m['loss'] for m in metrics]
