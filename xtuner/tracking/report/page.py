"""`report.html`: a self-contained page about a run, written from the files of its work folder."""

from __future__ import annotations

import base64
import hashlib
import logging
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xtuner.errors import CheckpointError, TrainingError, one_line
from xtuner.tracking.report.charts import Line, line_chart
from xtuner.tracking.report.parts import config_part, data_part, samples_part, sessions_part, text
from xtuner.tracking.report.read import RecordedRun, read_run, run_state
from xtuner.utils.files import write_atomically
from xtuner.utils.units import compact, duration

logger = logging.getLogger('xtuner')

REPORT_FILE = 'report.html'


def write_report(work_dir: Path) -> Path:
    """Writes the report into the work folder and returns its path.

    Raises:
        CheckpointError: The folder is not a work folder, or contains malformed files.
        TrainingError: The report cannot be written.
    """
    run = read_run(work_dir)
    try:
        page = render(run)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:  # a file was edited
        raise CheckpointError(
            f'{work_dir}: about.json, or a line of metrics.jsonl or samples.jsonl, is malformed: {one_line(error)}'
        ) from error
    path = work_dir / REPORT_FILE
    try:
        write_atomically(path, page)
    except OSError as error:
        raise TrainingError(f'cannot write {path}: {error.strerror}') from error
    return path


def try_to_report(work_dir: Path) -> None:
    """Writes `report.html`; logs a warning if that fails."""
    try:
        path = write_report(work_dir)
    except Exception as error:  # the report must not end the run
        logger.warning('no report: %s: %s', type(error).__name__, error)
    else:
        logger.info('report: %s', path)


def render(run: RecordedRun) -> str:
    """Renders the page. All content from files is escaped, and the policy allows only the script below, by its hash."""
    here = Path(__file__)
    style = here.with_name('page.css').read_text(encoding='utf-8')
    script = here.with_name('page.js').read_text(encoding='utf-8')
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    body = ''.join(
        [
            _header(run),
            _tiles(run),
            _charts(run),
            samples_part(run),
            data_part(run),
            sessions_part(run),
            config_part(run),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{text(run.name)}</title>\n<style>\n{style}</style></head>\n'
        f'<body><main>{body}{_footer(run)}</main>\n<script>{script}</script></body></html>\n'
    )


def _header(run: RecordedRun) -> str:
    about = run.about
    kind, words = run_state(run)
    facts = [about.get('method'), about.get('base'), about.get('data')]
    line = ' · '.join(text(fact) for fact in facts if fact)
    return (
        f'<header><div class="title"><h1>{text(run.name)}</h1><span class="state {kind}">{text(words)}</span></div>'
        f'<p>{line}</p></header>'
    )


def _tiles(run: RecordedRun) -> str:
    loss, validation, metrics = run.series('loss'), run.validation_loss, run.metrics
    tiles = []
    if len(loss):
        tiles.append(('loss', f'{loss.values[-1]:.3f}', f'from {loss.values[0]:.3f} at step {loss.steps[0]}'))
    if len(validation):
        best = min(range(len(validation)), key=validation.values.__getitem__)
        tiles.append(
            ('validation loss', f'{validation.values[best]:.3f}', f'lowest, at step {validation.steps[best]:,}')
        )
    steps = metrics[-1]['step'] if metrics else 0
    planned = run.about.get('plan', {}).get('num_steps')
    tiles.append(('steps', f'{steps:,}', f'of {planned:,} planned' if isinstance(planned, int) else ''))
    tokens, targets = (sum(_number(m, key) for m in metrics) for key in ('num_tokens', 'num_targets'))
    if tokens:
        tiles.append(('tokens', compact(tokens), f'{targets / tokens:.0%} of them trained'))
    seconds = sum(_number(m, 'seconds') for m in metrics)
    speed = run.series('tokens_per_second').values
    if speed:
        tiles.append(('training time', duration(seconds), f'median {statistics.median(speed):,.0f} tokens/s'))
    memory = run.series('peak_memory_gib').values
    if memory and max(memory) > 0:
        tiles.append(('peak memory', f'{max(memory):.1f} GiB', 'of the GPU, as torch counts'))
    skipped = sum(bool(m.get('skipped')) for m in metrics)
    if skipped:
        tiles.append(('skipped', f'{skipped:,}', 'steps without a finite gradient'))
    cells = ''.join(
        f'<div class="tile"><span>{name}</span><b>{value}</b><i>{note or "&nbsp;"}</i></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _number(line: dict[str, Any], key: str) -> float:
    value = line.get(key)
    return value if isinstance(value, (int, float)) else 0


def _charts(run: RecordedRun) -> str:
    lines = [Line('training', run.series('loss'), smooth=True), Line('validation', run.validation_loss, role='second')]
    legend = ''.join(f'<span><i class="{line.role}"></i>{line.name}</span>' for line in lines if len(line.series))
    drawn = line_chart(lines, label='loss over the steps', show=_loss, tick=lambda v: f'{v:g}')
    main = _figure('Loss', drawn, legend if len(run.validation_loss) else 'mean over target tokens, nats', 'wide')
    small = [
        _small(run, 'Learning rate', 'lr', _exponent, from_zero=True),
        _small(run, 'Gradient norm', 'grad_norm', lambda v: f'{v:.3g}', log=True, smooth=True, note='before clipping'),
        _small(
            run, 'Throughput', 'tokens_per_second', lambda v: f'{v:,.0f}', from_zero=True, smooth=True, note='tokens/s'
        ),
    ]
    if any(run.series('peak_memory_gib').values):
        small.append(
            _small(run, 'Peak memory', 'peak_memory_gib', lambda v: f'{v:.3g}', from_zero=True, note='GiB, so far')
        )
    else:
        small.append(
            _small(run, 'Time a step', 'seconds', lambda v: f'{v:.3g}', from_zero=True, smooth=True, note='seconds')
        )
    return f'{main}<div class="grid2">{"".join(small)}</div>'


def _small(
    run: RecordedRun, title: str, key: str, show: Callable[[float], str], *, note: str = '', smooth: bool = False,
    log: bool = False, from_zero: bool = False,
) -> str:  # fmt: skip
    line = Line(title.lower(), run.series(key), smooth=smooth)
    svg = line_chart(
        [line], label=f'{title} over the steps', show=show, width=500, height=190, log=log, from_zero=from_zero
    )
    return _figure(title, svg, note)


def _figure(title: str, svg: str, note: str, kind: str = '') -> str:
    caption = f'<figcaption><h2>{title}</h2><div class="legend">{note}</div></figcaption>'
    return f'<figure class="card {kind}">{caption}{svg}</figure>'


def _exponent(value: float) -> str:
    """'2e-4' for 0.0002."""
    if not value:
        return '0'
    mantissa, _, exponent = f'{value:.1e}'.partition('e')
    return f'{mantissa.removesuffix(".0")}e{int(exponent)}'


def _loss(value: float) -> str:
    return f'{value:.4f}' if abs(value) < 0.1 else f'{value:.3f}'


def _footer(run: RecordedRun) -> str:
    version = (run.about.get('sessions') or [{}])[-1].get('versions', {}).get('xtuner', '')
    lines = f'{run.num_torn} line{"s" * (run.num_torn > 1)}'
    torn = f' {lines} of the logs could not be read.' if run.num_torn else ''
    return f'<footer>Written by xtuner {text(version)} from the files next to this page.{torn}</footer>'
