"""What `make demo` prints, checks and says when it fails; the whole of it with `-m slow`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo import demo
from demo.table import display_width, format_table, wrap

ROOT = Path(__file__).parents[2]
QUESTIONS = [('Name?', 'Pebble.'), ('Age?', 'One day.')]
GOOD = [('Name?', 'None.', 'Pebble.', 'Pebble.'), ('Age?', 'New.', 'One day.', 'One day.')]


def test_columns_are_aligned_with_chinese_in_them() -> None:
    table = format_table(('question', 'base'), [('你是谁？', 'a b'), ('x', 'long enough to wrap')], cell_width=8)
    assert table.splitlines() == [
        'question | base',
        '---------+--------',
        '你是谁？ | a b',
        '---------+--------',
        'x        | long',
        '         | enough',
        '         | to wrap',
    ]


@pytest.mark.parametrize(
    ('text', 'lines'),
    [('', ['']), ('12345', ['12345']), ('123456', ['12345', '6']), ('ab cd ef', ['ab cd', 'ef']),
     ('你好吗', ['你好', '吗']), ('a 你好吗', ['a', '你好', '吗'])],
)  # fmt: skip
def test_wrap(text: str, lines: list[str]) -> None:
    assert wrap(text, 5) == lines
    assert all(display_width(line) <= 5 for line in lines)


def test_good_answers_pass() -> None:
    demo.check_answers(QUESTIONS, GOOD)


@pytest.mark.parametrize(
    ('column', 'answer', 'message'),
    [(1, 'One day.', 'the base model already answers'), (2, 'Two days.', 'the fine-tuned model answers'),
     (3, 'One day', 'the merged model answers')],
)  # fmt: skip
def test_a_wrong_answer_is_named(column: int, answer: str, message: str) -> None:
    row = [*GOOD[1]]
    row[column] = answer
    with pytest.raises(demo.DemoError, match=message) as caught:
        demo.check_answers(QUESTIONS, [GOOD[0], tuple(row)])
    assert 'Age?' in str(caught.value)


def test_a_command_that_fails_ends_the_demo(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.os, 'chdir', lambda folder: None)
    monkeypatch.setenv('OMP_WAIT_POLICY', 'PASSIVE')
    for name in ('XTUNER_CACHE', 'HF_HUB_OFFLINE', 'TQDM_DISABLE'):
        monkeypatch.setenv(name, '')  # put back afterwards
    monkeypatch.setattr(demo, 'make_models', lambda: demo.xtuner('train', 'internlm_tiny_nothing'))
    assert demo.main() == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith('demo failed: `xtuner train internlm_tiny_nothing` failed with exit status ')


@pytest.mark.parametrize(('words', 'status'), [(['--help'], 0), (['--fast'], 2)])
def test_it_begins_only_when_it_is_asked_to(words: list[str], status: int, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(demo, 'make_models', lambda: pytest.fail('begun'))
    with pytest.raises(SystemExit) as ended:
        demo.main(words)
    assert ended.value.code == status
    assert ('work_dirs/demo' in capsys.readouterr().out) == (status == 0)


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    """In a folder of its own, so that a demo that somebody made stays."""
    for name in ('demo', 'configs'):
        (tmp_path / name).symlink_to(ROOT / name)
    code = f'import demo.demo as d, pathlib; d.ROOT = pathlib.Path({str(tmp_path)!r}); raise SystemExit(d.main())'
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'The secret word is lantern.' in done.stdout
    assert (tmp_path / 'work_dirs/demo/merged/config.json').is_file()
