"""What needs no import is refused before torch is imported, and what takes long begins with a line that says so."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.unit

# Runs a command line; an import of torch ends the process, so that nothing after it can pass for early.
RUN = """
import os, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name in ('torch', 'transformers'):
            sys.stderr.flush()
            os._exit(42)

sys.meta_path.insert(0, NoTorch())
from xtuner.cli.main import main
status = main(sys.argv[1:])
assert 'torch' not in sys.modules
sys.exit(status)
"""
IMPORTED_TORCH = 42
CONFIG = 'internlm_7b_qlora_oasst1'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with what passes for a model, an adapter, data and a used work folder, by names alone."""
    for folder in ('model', 'adapter', 'used/checkpoint-00000003', 'full'):
        (tmp_path / folder).mkdir(parents=True)
    manifest = {'run.json': {'bytes': 2, 'sha256': '0'}}  # without one, a folder is no checkpoint
    (tmp_path / 'used/checkpoint-00000003/manifest.json').write_text(json.dumps(manifest), encoding='utf-8')
    (tmp_path / 'full' / 'file').touch()
    (tmp_path / 'data.jsonl').write_text('{"messages": []}\n', encoding='utf-8')
    return tmp_path


@pytest.fixture
def port() -> Iterator[int]:
    """A port that something else listens at."""
    with socket.create_server(('127.0.0.1', 0)) as other:
        yield other.getsockname()[1]


def call(place: Path, *words: str) -> tuple[int, str]:
    """Exit status and stderr of a command line, called in the folder."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1'}
    done = subprocess.run(
        [sys.executable, '-c', RUN, *words], cwd=place, env=environment, capture_output=True, encoding='utf-8'
    )
    return done.returncode, done.stderr


TRAIN = ['train', CONFIG, '--model', 'model', '--data', 'data.jsonl']
REFUSALS = {
    'used work folder': ([*TRAIN, '--work-dir', 'used'], 1, 'used already contains checkpoints; add --resume'),
    'work folder is a file': ([*TRAIN, '--work-dir', 'data.jsonl'], 1, 'cannot write to data.jsonl: it is a file'),
    'resume nothing': (
        [*TRAIN, '--work-dir', 'used', '--resume', 'used/checkpoint-00000009'],
        1,
        'no such folder; did you mean used/checkpoint-00000003?',
    ),
    'start from nothing': ([*TRAIN, '--start-from', 'none'], 1, '--start-from none: no such folder'),
    'both': ([*TRAIN, '--resume', '--start-from', 'adapter'], 2, 'use one of them'),
    'train without a model': (['train', CONFIG, '--model', './none'], 1, "model './none': no such folder"),
    'train without data': ([*TRAIN, '--data', 'dat.jsonl'], 1, 'dat.jsonl: no such file or folder; did you'),
    'unknown key': ([*TRAIN, '--cfg-options', 'schedule.batch=2'], 1, 'unknown key `schedule.batch`'),
    'several devices': ([*TRAIN, '--work-dir', 'used', '--nproc-per-node', '2'], 1, 'already contains checkpoints'),
    'chat without a model': (['chat', 'none/../none'], 1, "model 'none/../none': no such folder"),
    'chat with an unknown hub id': (['chat', 'no-such-model'], 1, "model 'no-such-model' is not a local folder"),
    'chat without an adapter': (['chat', 'model', '--adapter', 'none'], 1, 'none: no adapter found'),
    'web on a taken port': (['chat', 'model', '--web', '--port', 'PORT'], 2, '--port PORT: Address already in use'),
    'serve without a model': (['serve', './none', '--port', '0'], 1, "model './none': no such folder"),
    'serve without an adapter': (['serve', 'model', '--port', '0', '--adapter', 'x=none'], 1, 'none: no adapter found'),
    'serve two of a name': (
        ['serve', 'model', '--adapter', 'a=adapter', '--adapter', 'a=full'],
        2,
        "--adapter a=full: the name 'a' is already used",
    ),
    'serve on a taken port': (['serve', 'model', '--port', 'PORT'], 2, 'cannot listen on 127.0.0.1:PORT'),
    'serve at no address': (['serve', 'model', '--host', '999.1.1.1'], 2, '--host 999.1.1.1: '),
    'merge into a full folder': (['convert', 'merge', 'model', 'adapter', 'full'], 1, 'full is not empty'),
    'merge of nothing': (['convert', 'merge', 'model', 'none', 'out'], 1, 'none: no adapter found'),
    'merge into nothing': (['convert', 'merge', './none', 'adapter', 'out'], 1, "model './none': no such folder"),
    'check of nothing': (
        ['check-custom-dataset', CONFIG, '--model', 'model', '--data', './none'],
        1,
        './none: no such file',
    ),
    'estimate of nothing': (['estimate', CONFIG, '--model', './none'], 1, "model './none': no such folder"),
}


@pytest.mark.parametrize('name', REFUSALS)
def test_it_is_refused_before_torch_is_imported(name: str, place: Path, port: int) -> None:
    words, status, message = REFUSALS[name]
    before = sorted(place.rglob('*'))
    found, said = call(place, *(word.replace('PORT', str(port)) for word in words))
    assert (found, said.count('\n')) == (status, 1), said
    assert said.startswith('xtuner: error: ') and message.replace('PORT', str(port)) in said
    assert sorted(place.rglob('*')) == before


@pytest.mark.parametrize(
    'words',
    [
        TRAIN,
        ['chat', 'model', '--adapter', 'adapter'],
        ['serve', 'model', '--port', '0'],
        ['convert', 'merge', 'model', 'adapter', 'out'],
    ],
)
def test_the_first_line_comes_before_the_imports(words: list[str], place: Path) -> None:
    status, said = call(place, *words)
    assert status == IMPORTED_TORCH
    assert said.count('\n') == 1 and said.endswith('  loading PyTorch and transformers ...\n')
