"""The report of a work folder: what it says, that it is one file, that nothing from the data gets out of its text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.hostile_text import COMMANDS, obeyed
from xtuner.cli.main import main
from xtuner.tracking.report.page import render, write_report
from xtuner.tracking.report.read import read_run
from xtuner.utils.escape import printable

EVIL = '"></p><script>alert(1)</script><img src=https://example.org/x onerror=alert(2)>\'`&' + COMMANDS


class Tags(HTMLParser):
    """Collects tags with their attributes, and checks that they are closed in order."""

    VOID = ('meta', 'circle', 'rect', 'path', 'line', 'img', 'br')

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    return tags


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines), encoding='utf-8')


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    """A run of 60 steps with everything in it, its data as evil as can be."""
    folder = tmp_path / 'run'
    folder.mkdir()
    steps = [
        {'step': i, 'loss': 3 - i / 60, 'lr': 1e-4, 'grad_norm': 1.0, 'num_tokens': 1000, 'num_targets': 600,
         'tokens_per_second': 100.0, 'seconds': 10.0, 'peak_memory_gib': 5.5, 'skipped': i == 7}
        for i in range(1, 61)
    ]  # fmt: skip
    steps[6]['loss'] = float('nan')
    write_lines(folder / 'metrics.jsonl', [*steps, {'step': 30, 'val_loss': 2.5}, {'step': 60, 'val_loss': 2.75}])
    samples = [{'step': s, 'prompt': EVIL, 'answer': f'{s}{EVIL}', 'finished': s > 0} for s in (0, 20, 40, 60)]
    write_lines(folder / 'samples.jsonl', samples)
    (folder / 'config.py').write_text(f'# {EVIL}\nmodel = dict(path={EVIL!r})\n', encoding='utf-8')
    about = {
        'base': EVIL, 'method': EVIL, 'data': EVIL, 'plan': {'num_steps': 60}, 'template': EVIL,
        'parameters': {'all': 1000, 'trained': 10},
        'dataset': {'train': {
            'records': 9, 'conversations': 9, 'kept': 8, 'tokens': 100, 'target_tokens': 80, 'packs': 2, 'fill': 0.9,
            'counts': {'bad': 1}, 'examples': {'bad': [EVIL]}, 'formats': {EVIL: EVIL},
            'lengths': {'edges': [0, 5, 10], 'counts': [3, 5]}}},
        'sessions': [{'started': '2026-01-02T03:04:05+00:00', 'from_step': 0, 'end': f'failed: {EVIL}',
                      'versions': {'xtuner': EVIL, EVIL: '1'}, 'devices': {'processor': EVIL, 'gpus': [{'name': EVIL}]},
                      'git': {'commit': EVIL, 'branch': EVIL, 'num_changed_files': 2}}],
    }  # fmt: skip
    (folder / 'about.json').write_text(json.dumps(about), encoding='utf-8')
    return folder


def test_nothing_from_the_data_becomes_markup_or_a_request(work_dir: Path) -> None:
    page = write_report(work_dir).read_text(encoding='utf-8')
    tags = parse(page)
    assert sum(tag == 'script' for tag, _ in tags.tags) == 1
    assert not any(tag in ('img', 'link', 'iframe', 'object', 'base') for tag, _ in tags.tags)
    for _, attributes in tags.tags:
        assert not any(name.startswith('on') or name in ('src', 'href', 'srcdoc') for name in attributes)
    style = re.search(r'<style>(.*?)</style>', page, re.DOTALL)
    assert style
    assert 'url(' not in style[1]
    assert '@import' not in style[1]
    assert printable(EVIL) in ''.join(tags.text)  # it is there, as text


def test_nothing_turns_the_page_around(work_dir: Path) -> None:
    page = render(read_run(work_dir))
    assert 'clear' in page and not obeyed(page)


def test_only_the_page_s_own_script_may_run(work_dir: Path) -> None:
    page = render(read_run(work_dir))
    policy = next(a['content'] or '' for t, a in parse(page).tags if a.get('http-equiv') == 'Content-Security-Policy')
    script = re.search(r'<script>(.*)</script>', page, re.DOTALL)
    assert script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_the_page_tells_the_run(work_dir: Path) -> None:
    text = ' '.join(parse(render(read_run(work_dir))).text)
    for part in ('failed at step 60', '2.000', 'from 2.983 at step 1', '2.500', 'lowest, at step 30', '60 k',
                 '60% of them trained', '10 min', 'median 100 tokens/s', '5.5 GiB', 'steps without a finite gradient',
                 'before', 'during', 'after', 'cut at the limit', '1 more round', 'could not be used',
                 '80.0% of the tokens are trained', '1,000, 10 trained (1.00%)', '2 files changed since'):  # fmt: skip
        assert part in text, part


def test_a_torn_line_and_missing_files_are_no_obstacle(work_dir: Path) -> None:
    for name in ('about.json', 'samples.jsonl', 'config.py'):
        (work_dir / name).unlink()
    with (work_dir / 'metrics.jsonl').open('a', encoding='utf-8') as file:
        file.write('{"step": 61, "lo')
    text = ' '.join(parse(render(read_run(work_dir))).text)
    assert 'not finished at step 60' in text
    assert '1 line of the logs could not be read' in text


def test_command(work_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['report', str(work_dir)]) == 0
    assert capsys.readouterr().out.strip() == str(work_dir / 'report.html')
    (tmp_path / 'empty').mkdir()
    assert main(['report', str(tmp_path / 'empty')]) == 1
    assert 'is not a work folder of a run' in capsys.readouterr().err
