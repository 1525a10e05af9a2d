"""Formats numbers and states for the report."""

from __future__ import annotations

from xtuner.tracking.report.read import RecordedRun


def compact(number: float) -> str:
    """'1.23 M' for 1,234,567."""
    for size, unit in ((1e9, 'B'), (1e6, 'M'), (1e4, 'k')):
        if number >= size:
            return f'{number / (1e3 if unit == "k" else size):.3g} {unit}'
    return f'{number:,.0f}'


def duration(seconds: float) -> str:
    """'2 h 05 min', '20 min', '3 min 20 s', '12.3 s'."""
    if seconds < 60:
        return f'{seconds:.1f} s'
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours} h {minutes:02} min'
    return f'{minutes} min' if minutes >= 10 else f'{minutes} min {rest:02} s'


def run_state(run: RecordedRun) -> tuple[str, str]:
    """How the run ended: 'finished', 'stopped' or 'failed', and a description."""
    sessions = run.about.get('sessions') or [{}]
    end = str(sessions[-1].get('end', ''))
    step = run.metrics[-1]['step'] if run.metrics else 0
    if end == 'finished':
        return 'finished', 'finished'
    if end.startswith('failed'):
        return 'failed', f'failed at step {step:,}'
    return 'stopped', f'{"interrupted" if end.startswith("interrupted") else "not finished"} at step {step:,}'
