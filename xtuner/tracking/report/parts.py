"""Sections of the report besides its charts: samples, data, sessions, config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from xtuner.tracking.report.charts import histogram
from xtuner.tracking.report.read import RecordedRun
from xtuner.utils.escape import printable

_MAX_SESSIONS = 20
_LOSSES = {
    'bad': 'could not be used',
    'left_out': 'skipped by the map function',
    'too_long': 'dropped because longer than max_length',
    'cut': 'truncated to max_length',
    'without_target': 'dropped because no token is trained',
}


def text(value: object) -> str:
    """Escapes a value as HTML text, including characters that change the text direction."""
    return escape(printable(str(value)), quote=True)


def samples_part(run: RecordedRun) -> str:
    """Answers before, during and after training, side by side; other rounds in a collapsed block."""
    by_prompt: dict[str, dict[int, dict[str, Any]]] = {}
    for sample in run.samples:
        by_prompt.setdefault(str(sample.get('prompt', '')), {})[sample['step']] = sample
    if not by_prompt:
        return ''
    last = run.metrics[-1]['step'] if run.metrics else 0
    return f'<section><h2>Samples</h2>{"".join(_prompt(p, rounds, last) for p, rounds in by_prompt.items())}</section>'


def _prompt(prompt: str, rounds: Mapping[int, dict[str, Any]], last: int) -> str:
    steps = sorted(rounds)
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    answers = ''.join(_answer(rounds[step], last) for step in shown)
    rest = ''.join(_answer(rounds[step], last) for step in steps if step not in shown)
    count = len(steps) - len(shown)
    name = f'{count} more round{"s" * (count > 1)}'
    more = f'<details><summary>{name}</summary><div class="rounds">{rest}</div></details>'
    return (
        f'<article class="card prompt"><h2>{text(prompt)}</h2><div class="rounds">{answers}</div>'
        f'{more if rest else ""}</article>'
    )


def _answer(sample: Mapping[str, Any], last: int) -> str:
    step = sample['step']
    when = 'before' if step == 0 else 'after' if step >= last else 'during'
    cut = '' if sample.get('finished', True) else ' · cut at the limit'
    name = f'{when} <em>· step {step:,}{cut}</em>'
    answer = str(sample.get('answer', '')).strip()
    return f'<div class="answer {when}"><h3>{name}</h3><p>{text(answer) or "<em>empty</em>"}</p></div>'


def data_part(run: RecordedRun) -> str:
    """Record counts of each part."""
    parts = run.about.get('dataset')
    if not isinstance(parts, dict) or not parts:
        return ''
    cards = ''.join(_data_card(name, summary) for name, summary in parts.items() if isinstance(summary, dict))
    return f'<section><h2>Data</h2>{cards}</section>' if cards else ''


def _data_card(name: str, summary: Mapping[str, Any]) -> str:
    title = {'train': 'Training data', 'val': 'Validation data'}.get(name, name)
    shown = dict(summary)
    for part, whole in (('part_conversations', 'kept'), ('part_tokens', 'tokens')):
        if shown.get(part) == shown.get(whole):
            del shown[part]  # all kept records are in this part
    rows: list[tuple[str, object]] = [
        (label, f'{shown[key]:,}') for key, label in (
            ('records', 'records'), ('conversations', 'conversations'), ('kept', 'conversations kept'),
            ('tokens', 'tokens in all of them'), ('part_conversations', 'conversations of this part'),
            ('part_tokens', 'tokens of this part'), ('packs', 'packs'),
        ) if isinstance(shown.get(key), int)
    ]  # fmt: skip
    if isinstance(summary.get('fill'), float):
        rows.append(('packs are full', f'{summary["fill"]:.1%}'))
    for kind, number in (summary.get('counts') or {}).items():
        if number:
            where = '; '.join(map(str, (summary.get('examples') or {}).get(kind, [])))
            rows.append((_LOSSES.get(kind, kind), f'{number:,}' + (f': {where}' if where else '')))
    for source, format_text in (summary.get('formats') or {}).items():
        rows.append((str(source), format_text))
    tokens, targets = summary.get('tokens'), summary.get('target_tokens')
    bar = ''
    if isinstance(tokens, int) and isinstance(targets, int) and tokens:
        bar = (
            f'<div class="share" title="trained"><i style="width:{100 * targets / tokens:.2f}%"></i></div>'
            f'<p class="small">{targets / tokens:.1%} of the tokens are trained, the rest is context</p>'
        )
    lengths = summary.get('lengths')
    chart = ''
    if isinstance(lengths, dict) and lengths.get('counts'):
        chart = histogram(lengths['edges'], lengths['counts'], label='tokens of a conversation')
        chart = f'<div><p class="small">How long conversations are, in tokens</p>{chart}</div>'
    body = f'<div class="split">{_table(rows)}{chart}</div>'
    return f'<figure class="card"><figcaption><h2>{text(title)}</h2></figcaption>{bar}{body}</figure>'


def sessions_part(run: RecordedRun) -> str:
    """Each session with its end, then versions and machine of the last one."""
    sessions = [s for s in run.about.get('sessions') or [] if isinstance(s, dict)]
    if not sessions:
        return ''
    rows = ''.join(
        f'<tr><td>{text(_when(s.get("started")))}</td><td>{text(_when(s.get("ended")))}</td>'
        f'<td class="number">{text(s.get("from_step", ""))}</td><td>{text(s.get("end", ""))}</td></tr>'
        for s in sessions[-_MAX_SESSIONS:]
    )
    head = '<thead><tr><th>started, UTC</th><th>ended</th><th>from step</th><th>end</th></tr></thead>'
    last = sessions[-1]
    return (
        f'<section><h2>Run</h2><div class="card scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
        f'<div class="grid2">{_facts("What", _what(run))}'
        f'{_facts("Versions", list((last.get("versions") or {}).items()))}'
        f'{_facts("Machine", _machine(last))}{_facts("Repository", _git(last))}'
        '</div></section>'
    )


def _what(run: RecordedRun) -> list[tuple[str, object]]:
    about, plan = run.about, run.about.get('plan') or {}
    parameters = about.get('parameters') or {}
    rows: list[tuple[str, object]] = [
        (label, about[key]) for key, label in (
            ('base', 'base model'), ('base_fingerprint', 'its fingerprint'), ('method', 'method'),
            ('template', 'template'), ('compute_dtype', 'computed in'), ('fast_path', 'path'), ('data', 'data'),
        ) if about.get(key)
    ]  # fmt: skip
    if parameters:
        share = parameters['trained'] / max(1, parameters['all'])
        rows.append(('parameters', f'{parameters["all"]:,}, {parameters["trained"]:,} trained ({share:.2%})'))
    counted = (
        ('num_items', 'packs'), ('items_per_step', 'packs a step'), ('num_steps', 'steps'),
        ('num_warmup_steps', 'warm-up steps'), ('world_size', 'devices'),
    )  # fmt: skip
    rows += [(label, f'{plan[key]:,}') for key, label in counted if isinstance(plan.get(key), int)]
    return rows


def _machine(session: Mapping[str, Any]) -> list[tuple[str, object]]:
    devices = session.get('devices') or {}
    gpus = [f'{g.get("name")}, {g.get("memory_gib")} GiB' for g in devices.get('gpus') or []]
    rows = [(gpu, gpus.count(gpu)) for gpu in dict.fromkeys(gpus)]
    labels = (
        ('cuda', 'CUDA'), ('processor', 'processor'), ('cores', 'cores'), ('memory_gib', 'memory, GiB'),
        ('system', 'system'),
    )  # fmt: skip
    return [
        *((f'GPU{"s" if count > 1 else ""}', f'{count} x {gpu}' if count > 1 else gpu) for gpu, count in rows),
        *((label, devices[key]) for key, label in labels if devices.get(key)),
    ]


def _git(session: Mapping[str, Any]) -> list[tuple[str, object]]:
    state = session.get('git')
    if not isinstance(state, dict):
        return [('state', 'the run was not started inside a git repository')]
    changed = state.get('num_changed_files')
    dirty = 'unknown' if changed is None else 'clean' if changed == 0 else f'{changed} files changed since'
    return [('commit', state.get('commit')), ('branch', state.get('branch')), ('state', dirty)]


def config_part(run: RecordedRun) -> str:
    """The flat config with dimmed comments."""
    if not run.config:
        return ''
    lines = (_config_line(line) for line in run.config.splitlines())
    body = '\n'.join(lines)
    return (
        '<section><h2>Config</h2><details class="card"><summary>config.py</summary>'
        f'<pre>{body}</pre></details></section>'
    )


def _config_line(line: str) -> str:
    before, mark, comment = line.partition('# ')
    quotes = before.count("'") % 2 or before.count('"') % 2  # the mark is inside a string
    return text(line) if quotes or not mark else f'{text(before)}<span class="comment">{text(mark + comment)}</span>'


def _facts(title: str, rows: Sequence[tuple[str, object]]) -> str:
    return f'<figure class="card"><figcaption><h2>{title}</h2></figcaption>{_table(rows)}</figure>' if rows else ''


def _table(rows: Sequence[tuple[str, object]]) -> str:
    cells = ''.join(f'<tr><th>{text(name)}</th><td>{text(value)}</td></tr>' for name, value in rows)
    return f'<table><tbody>{cells}</tbody></table>'


def _when(moment: object) -> str:
    return str(moment or '').replace('T', ' ').replace('+00:00', '')
