"""What a run must have in common with the checkpoint that it goes on from, and what it may begin with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.faults.lives import metrics, newest, result, words_for
from xtuner.cli.main import main
from xtuner.dataset.map_fns import formats
from xtuner.dataset.map_fns.registration import never
from xtuner.engine import batches
from xtuner.engine import run as training
from xtuner.engine.checkpoint import run_manifest
from xtuner.engine.checkpoint.store import MANIFEST_FILE

Train = Callable[..., int]


@pytest.fixture
def train(tiny_internlm: Path, conversations: Path, tmp_path: Path) -> Train:
    """Trains in `tmp_path/NAME`; `words` stand before the config's options."""

    def run(
        name: str, *options: str, steps: int = 4, data: Path = conversations, words: tuple[str, ...] = ('--resume',)
    ) -> int:
        line = words_for(tiny_internlm, data, tmp_path / name, *options, steps=steps)
        line.remove('--resume')
        return main([*line[:2], *words, *line[2:]])

    return run


def test_the_same_conversations_elsewhere_are_the_same_data(train: Train, conversations: Path, tmp_path: Path) -> None:
    assert train('whole') == 0
    shutil.copytree(tmp_path / 'whole', tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoint-00000004')
    moved = tmp_path / 'elsewhere' / 'renamed.jsonl'
    moved.parent.mkdir()
    shutil.copyfile(conversations, moved)
    options = ['checkpoint.max_keep=5', 'log.interval=3', 'samples.interval=7', 'runtime.num_workers=1']
    assert train('run', *options, data=moved) == 0
    assert result(tmp_path / 'run') == result(tmp_path / 'whole')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['schedule.decay=linear'], "`schedule.decay` was 'cosine' and is now 'linear'"),
        (['optimizer.weight_decay=0.5'], '`optimizer.weight_decay` was 0.0 and is now 0.5'),
        (['schedule.accumulative_counts=1', 'schedule.batch_size=2'], '`schedule.batch_size` was 1 and is now 2'),
        (
            ['schedule.accumulative_counts=1'],
            'the items a step were 2 and are now 1: 1 for each completed step are read again',
        ),
        (['schedule.batch_size=3'], 'the items a step were 2 and are now 6: 4 for each completed step are skipped'),
        (['dataset.max_length=32'], 'the conversations or their packs differ'),
    ],
)
def test_a_change_is_named_refused_and_allowed(
    options: list[str], message: str, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train('run', steps=4) == 0
    shutil.rmtree(tmp_path / 'run' / 'checkpoint-00000004')
    capsys.readouterr()
    assert train('run', *options) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert train('run', *options, words=('--resume', '--allow-changes')) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if 'resuming despite a change:' in line]
    assert any(message in line for line in told)


def test_allowed_changes_take_effect(train: Train, tmp_path: Path) -> None:
    """The optimizer's settings are in its saved state as well."""
    assert train('run', steps=3) == 0
    options = ['schedule.decay=constant', 'optimizer.lr=0.5', 'optimizer.weight_decay=0.25']
    assert train('run', *options, steps=6, words=('--resume', '--allow-changes')) == 0
    assert [m['lr'] for m in metrics(tmp_path / 'run')][3:] == [0.5] * 3
    state = json.loads((newest(tmp_path / 'run') / 'trainer.json').read_text(encoding='utf-8'))
    assert '["weight_decay", 0.25]' in json.dumps(state)


def test_another_record_is_another_data_set(
    train: Train, conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train('run', steps=3) == 0
    text = conversations.read_text(encoding='utf-8')
    conversations.write_text(text.replace('5, of course', '6, of course'), encoding='utf-8')
    assert train('run', steps=3) == 1
    assert 'the conversations or their packs differ' in capsys.readouterr().err


def test_begin_with_the_weights_of_another_run(train: Train, tmp_path: Path) -> None:
    assert train('first') == 0
    folder = newest(tmp_path / 'first')
    assert train('second', 'optimizer.lr=0.0', steps=2, words=('--start-from', str(folder))) == 0
    log = metrics(tmp_path / 'second')
    assert [m['step'] for m in log] == [1, 2]
    assert log[0]['loss'] < metrics(tmp_path / 'first')[0]['loss']
    before, after = (load_file(f / 'adapter_model.safetensors') for f in (folder, newest(tmp_path / 'second')))
    assert before.keys() == after.keys()
    assert all(bool((before[name] == after[name]).all()) for name in before)  # a learning rate of 0 keeps them
    assert main(['print-config', str(tmp_path / 'second' / 'config.py')]) == 0


def test_resume_with_a_path_takes_that_checkpoint(train: Train, tmp_path: Path) -> None:
    """Also where later ones stand beside it, which are written again with the same bytes."""
    keep = 'checkpoint.max_keep=-1'
    assert train('run', keep) == 0
    expected: dict[str, Any] = result(tmp_path / 'run')
    assert train('run', keep, words=('--resume', str(tmp_path / 'run' / 'checkpoint-00000002'))) == 0
    assert result(tmp_path / 'run') == expected
    assert train('other', keep, words=('--resume', str(tmp_path / 'run' / 'checkpoint-00000002'))) == 0
    assert (newest(tmp_path / 'other') / 'adapter_model.safetensors').read_bytes() == expected[
        'adapter_model.safetensors'
    ]


def test_the_resume_of_a_whole_run_trains_nothing(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train('run') == 0
    expected = result(tmp_path / 'run')
    capsys.readouterr()
    assert train('run') == 0
    assert capsys.readouterr().out == f'{tmp_path / "run" / "checkpoint-00000004"}\n'
    assert result(tmp_path / 'run') == expected


def test_seeds_of_any_size(train: Train, tmp_path: Path) -> None:
    for seed in (2**24, 2**32 - 1):
        assert train(f'{seed}', f'runtime.seed={seed}', steps=1) == 0
    assert metrics(tmp_path / f'{2**24}') != metrics(tmp_path / f'{2**32 - 1}')


@pytest.mark.parametrize('options', [['dataset.max_length=128'], ['dataset.max_length=128', 'dataset.streaming=True']])
def test_a_run_of_an_earlier_release_keeps_the_format_that_it_detected(
    options: list[str], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints have no `formats`; about.json has, but for streams."""
    pairs = [{'prompt': f'Say {i}.', 'completion': f'{i}, of course.'} for i in range(12)]
    data = tmp_path / 'pairs.jsonl'
    data.write_text('\n'.join(map(json.dumps, pairs)))
    known = formats()
    monkeypatch.setattr(known['prompt_completion'], 'detect', never)
    monkeypatch.setattr(known['code_alpaca'], 'detect', lambda record: 'completion' in record)
    assert train('whole', *options, data=data) == 0
    shutil.copytree(tmp_path / 'whole', tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoint-00000004')
    for file in (tmp_path / 'run').glob('checkpoint-*/run.json'):
        content = json.loads(file.read_text(encoding='utf-8'))
        del content['formats']
        file.write_text(json.dumps(content), encoding='utf-8')
        _count_again(file)
    monkeypatch.undo()
    assert train('run', *options, data=data) == 0
    assert result(tmp_path / 'run') == result(tmp_path / 'whole')
    run = json.loads((newest(tmp_path / 'run') / 'run.json').read_text(encoding='utf-8'))
    assert len(options) > 1 or list(run['formats'].values()) == ['detected as code_alpaca']


def _count_again(file: Path) -> None:
    """Brings the manifest of a checkpoint in line with one of its files."""
    manifest = file.parent / MANIFEST_FILE
    content = json.loads(manifest.read_text(encoding='utf-8'))
    content[file.name] = {'bytes': file.stat().st_size, 'sha256': hashlib.sha256(file.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(content), encoding='utf-8')


def test_a_run_begun_when_rounding_errors_counted_resumes_exactly(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `run.json` names no format; 0.28 of its 25 steps was 7.000000000000001, and so 8 steps of warm-up."""
    options = ['schedule.warmup_ratio=0.28', 'checkpoint.max_keep=-1', 'checkpoint.interval=20']

    def of_then(*args: Any, **named: Any) -> dict[str, Any]:
        return {key: value for key, value in run_manifest.describe_run(*args, **named).items() if key != 'format'}

    with monkeypatch.context() as then:
        then.setattr(training, 'describe_run', of_then)
        then.setattr(training, 'make_plan', lambda *args: replace(batches.make_plan(*args), float_products=True))
        assert train('whole', *options, steps=25) == 0
    expected = result(tmp_path / 'whole')
    assert expected['metrics'][0]['lr'] == pytest.approx(0.01 / 8)
    shutil.copytree(tmp_path / 'whole', tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoint-00000025')
    assert train('run', *options, steps=25) == 0
    assert result(tmp_path / 'run') == expected
    assert run_manifest.format_of_run(newest(tmp_path / 'run')) == 1
    assert train('new', *options, steps=25) == 0
    assert metrics(tmp_path / 'new')[0]['lr'] == pytest.approx(0.01 / 7)
    assert run_manifest.format_of_run(newest(tmp_path / 'new')) == run_manifest.FORMAT


def test_why_the_data_of_an_earlier_release_differs_is_said_as_a_possibility() -> None:
    now = {'data': 'b', 'dataset.ignore': []}
    told = run_manifest._changes({'data': 'a'}, now)
    assert told['data'].startswith('the conversations or their packs differ')
    assert told['dataset.ignore'].startswith('the run may have begun with an earlier release')
    assert all(word in told['dataset.ignore'] for word in ('`dataset.ignore`', 'test*, val*, hidden'))
    assert run_manifest._changes({'data': 'b'}, now) == {}
