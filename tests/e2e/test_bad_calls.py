"""Every row of the table: one line on stderr, exit status 1 or 2, no traceback, nothing left behind."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.e2e.bad_calls import (
    BAD_CHECKPOINTS,
    BAD_CONFIGS,
    BAD_DATA,
    BAD_MODELS,
    BAD_VALUES,
    FLAGSHIP,
    GOOD,
    SMALL,
    TRAIN,
    WRONG_CALLS,
)
from xtuner.cli.main import main

TABLES = (WRONG_CALLS, BAD_CONFIGS, BAD_VALUES, BAD_DATA, BAD_MODELS, BAD_CHECKPOINTS)
pytestmark = pytest.mark.usefixtures('no_network')


def test_the_table_is_long_enough() -> None:
    assert sum(map(len, TABLES)) >= 150


class Place:
    """A folder with a model and data, in which commands are run."""

    def __init__(self, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        (folder / 'data.jsonl').write_text(GOOD * 8, encoding='utf-8')
        self.names = {'MODEL': 'model', 'DATA': 'data.jsonl', 'RUN': 'run', 'CONFIG': 'config.py', 'DONE': 'done'}
        shutil.copytree(model, folder / 'model')

    def run(self, words: Sequence[str]) -> tuple[int, str]:
        """Exit status and stderr of a command line with the table's names in it."""
        self.capsys.readouterr()
        for name, file in self.names.items():
            words = [word.replace(name, file) for word in words]
        status = main(words)
        return status, self.capsys.readouterr().err

    def refuses(self, words: Sequence[str], message: str, *, status: int = 1) -> None:
        before = self.listing()
        got, err = self.run(words)
        lines = err.splitlines()
        errors = [line for line in lines if line.startswith('xtuner: error: ')]
        assert got == status, err
        assert len(errors) == 1, err
        assert lines[-1] == errors[0]
        assert message in errors[0]
        assert 'unexpected' not in err
        assert 'Traceback' not in err
        assert self.listing() == before

    def listing(self) -> list[tuple[str, int]]:
        """All folders, and files with their times; of the cache only what a builder has begun."""
        files = [p for p in self.folder.rglob('*') if 'cache' not in p.relative_to(self.folder).parts[:1]]
        torn = [p for p in self.folder.glob('cache/**/*') if '.part-' in p.name]
        return sorted((str(p), 0 if p.is_dir() else p.stat().st_mtime_ns) for p in [*files, *torn])


@pytest.fixture
def place(
    tmp_path: Path, tiny_internlm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.stdin', io.StringIO('Hello\n'))
    return Place(tmp_path, tiny_internlm, capsys)


@pytest.mark.parametrize('case', WRONG_CALLS)
def test_a_wrong_call(case: str, place: Place) -> None:
    words, message = WRONG_CALLS[case]
    place.refuses(words, message, status=2)


@pytest.mark.parametrize('case', BAD_CONFIGS)
def test_a_bad_config(case: str, place: Place) -> None:
    text, message = BAD_CONFIGS[case]
    (place.folder / 'config.py').write_text(text, encoding='utf-8')
    place.refuses(['print-config', 'CONFIG'], message)
    place.refuses(['train', 'CONFIG', '--work-dir', 'RUN'], message)


@pytest.mark.parametrize('case', BAD_VALUES)
def test_a_bad_value(case: str, place: Place) -> None:
    options, message = BAD_VALUES[case]
    place.refuses([*TRAIN[:-2], *SMALL, 'schedule.max_steps=1', *options], message)


@pytest.mark.skipif(torch.cuda.is_available(), reason='this GPU may have FP8 units')
def test_fp8_is_refused_before_data_is_prepared(place: Place) -> None:
    place.refuses(
        [*TRAIN[:-2], *SMALL, 'schedule.max_steps=1', 'runtime.fp8=True'], 'device type cpu does not support FP8'
    )
    assert not list(place.folder.glob('cache/**/*'))


@pytest.mark.parametrize('case', BAD_DATA)
def test_bad_data(case: str, place: Place) -> None:
    name, content, message = BAD_DATA[case]
    (place.folder / 'data.jsonl').unlink()
    if content is not None:
        (place.folder / name).parent.mkdir(exist_ok=True)
        (place.folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    place.names['DATA'] = name.split('/')[0]
    place.refuses([*TRAIN, *SMALL], message)


@pytest.mark.parametrize('case', BAD_MODELS)
def test_a_bad_model(case: str, place: Place) -> None:
    changes, message = BAD_MODELS[case]
    for name, change in changes.items():
        path = place.folder / 'model' / name
        if change in ('remove', 'file'):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            if change == 'file':
                (place.folder / 'model').write_text('no folder', encoding='utf-8')
        elif change == 'cut':
            path.write_bytes(path.read_bytes()[:-1000])
        elif isinstance(change, dict):
            path.write_text(json.dumps(json.loads(path.read_text(encoding='utf-8')) | change), encoding='utf-8')
        else:
            assert isinstance(change, bytes)
            path.write_bytes(change)
    place.refuses([*TRAIN, *SMALL], message)


@pytest.fixture(scope='module')
def done(tiny_internlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder after two steps on the good data."""
    folder = tmp_path_factory.mktemp('done')
    (folder / 'data.jsonl').write_text(GOOD * 8, encoding='utf-8')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XTUNER_CACHE', str(folder / 'cache'))
        words = ['train', FLAGSHIP, '--model', str(tiny_internlm), '--data', str(folder / 'data.jsonl'), '--work-dir',
                 str(folder / 'done'), '--max-steps', '2', *SMALL, 'checkpoint.interval=1']  # fmt: skip
        assert main(words) == 0
    return folder / 'done'


@pytest.mark.parametrize('case', BAD_CHECKPOINTS)
def test_a_bad_checkpoint(case: str, place: Place, done: Path) -> None:
    words, message = BAD_CHECKPOINTS[case]
    shutil.copytree(done, place.folder / 'done')
    place.refuses(words, message)
