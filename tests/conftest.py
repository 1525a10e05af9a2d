"""Fixtures that several rooms share."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # before any test imports a library that reads it
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # a core a worker: threads of several would wait for each other
if not Path('/dev/nvidiactl').exists():
    os.environ.setdefault('TRITON_INTERPRET', '1')  # Triton's kernels are tested on the CPU where there is no GPU

ROOT = Path(__file__).parent.parent
SLOW_TIMEOUT_S = 3600
HEAVY = {'torch', 'transformers'}
SHARED_DATA = ('internlm-7b-tokenizer', 'gsm8k_train.jsonl', 'gsm8k_test.jsonl', 'oasst_en_100_trees.jsonl')


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--unit`: the tests that are marked unit, in a process into which torch and transformers do not come."""
    parser.addoption('--unit', action='store_true', help='only tests marked unit; importing torch fails them')


def pytest_configure(config: pytest.Config) -> None:
    """With `--unit` an import of torch or transformers raises where it stands."""
    if config.getoption('--unit'):
        config.option.markexpr = f'unit and not torch and ({config.option.markexpr})'
        sys.addaudithook(_refuse_heavy_import)


def _refuse_heavy_import(event: str, arguments: tuple[Any, ...]) -> None:
    if event == 'import' and arguments[0].partition('.')[0] in HEAVY:
        raise HeavyImport(f'a unit test imports {arguments[0]}: mark it otherwise, or import it later')


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--unit` files without a unit test are not even imported, nor the conftest.py of a folder without one."""
    is_folder = collection_path.is_dir()
    if not config.getoption('--unit') or (is_folder and config.rootpath not in collection_path.parents):
        return None
    files = collection_path.rglob('test_*.py') if is_folder else [collection_path]
    return not any(f.suffix == '.py' and 'pytest.mark.unit' in f.read_text(encoding='utf-8') for f in files)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With `--unit`, finds imports that were caught, or went another way."""
    found = sorted(HEAVY & set(sys.modules))
    if session.config.getoption('--unit') and found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        sys.__stderr__.write(f'\nunit tests imported {", ".join(found)}\n')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked slow may take longer than the others."""
    for item in items:
        if item.get_closest_marker('slow') and not item.get_closest_marker('timeout'):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


class HeavyImport(BaseException):
    """A unit test imports torch or transformers; no `except Exception` hides it."""


@pytest.fixture(scope='session')
def shared_data() -> Path:
    """Real tokenizer and conversations, beside the checkout; they are not part of the project."""
    folder = ROOT.parent / 'shared' / 'data'
    missing = [name for name in SHARED_DATA if not (folder / name).exists()]
    if missing:
        pytest.skip(f'{folder} lacks {", ".join(missing)}: real tokenizer and conversations, where they are available')
    return folder


@pytest.fixture(scope='session')
def real_model() -> Path:
    """SmolLM2-135M-Instruct, as `make demo-real` leaves it, or where the variable says."""
    folder = Path(os.environ.get('XTUNER_REAL_MODEL', ROOT / 'work_dirs' / 'real' / 'model'))
    if not (folder / 'config.json').is_file():
        pytest.skip(f'{folder} holds no model: `make demo-real` makes it, or XTUNER_REAL_MODEL names another folder')
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared data goes to the test's own folder, not to the user's cache."""
    monkeypatch.setenv('XTUNER_CACHE', str(tmp_path / 'cache'))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach another machine fails the test."""

    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f'tried to connect to {address}')

    monkeypatch.setattr(socket.socket, 'connect', refuse)


def write_internlm(folder: Path, *, vocab_size: int, hidden: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """Random weights in InternLM-7B's published format: its config fields, biases on q, k, v and o, safetensors."""
    import torch

    from xtuner.model.families.internlm.configuration import InternLMConfig
    from xtuner.model.families.internlm.modeling import InternLMForCausalLM

    torch.manual_seed(seed)
    config = InternLMConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.1,
    )
    model = InternLMForCausalLM(config)
    for parameter in model.parameters():  # biases begin at zero, which would hide that they are lost
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    published = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    published['auto_map'] = {'AutoModelForCausalLM': 'modeling_internlm.InternLMForCausalLM'}
    (folder / 'config.json').write_text(json.dumps(published), encoding='utf-8')
    return folder


@pytest.fixture(scope='session')
def tiny_internlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer InternLM with a vocabulary of 800 pieces, as a folder that looks like a published one."""
    from demo.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp('internlm')
    train_tokenizer([ROOT / 'demo' / 'base.jsonl'], folder, vocab_size=800)
    return write_internlm(folder, vocab_size=800)


@pytest.fixture(scope='session')
def real_vocabulary_internlm(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A two-layer InternLM with InternLM-7B's own 103,168 pieces."""
    folder = tmp_path_factory.mktemp('internlm-real')
    shutil.copyfile(shared_data / 'internlm-7b-tokenizer' / 'tokenizer.model', folder / 'tokenizer.model')
    return write_internlm(folder, vocab_size=103168)


@pytest.fixture(scope='session')
def folder_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """InternLM-7B as far as an estimate needs it: one file of settings."""
    from benchmarks.internlm_7b import SHAPE

    folder = tmp_path_factory.mktemp('internlm-7b')
    (folder / 'config.json').write_text(json.dumps(SHAPE), encoding='utf-8')
    return folder


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """Twelve short conversations in the OpenAI form."""
    path = tmp_path / 'conversations.jsonl'
    with path.open('w', encoding='utf-8') as file:
        for i in range(12):
            messages = [{'role': 'user', 'content': f'Say {i}.'}, {'role': 'assistant', 'content': f'{i}, of course.'}]
            file.write(json.dumps({'messages': messages}) + '\n')
    return path
