"""Prepared data must not be taken for that of another map function, however far away the difference is."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import xtuner.dataset.cache.function_hash as function_hash
from tests.conftest import ROOT
from xtuner.dataset.cache.function_hash import fingerprint_function

pytestmark = pytest.mark.unit

MINE = {'mine.py': 'import helper\n\n\ndef fn(example):\n    return helper.text(example)\n'}


@pytest.fixture
def hash_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The hash of `mine.fn` where these files, which hold `{}` for a detail, lie in a folder of their own."""
    made = []

    def run(files: dict[str, str], detail: str = '', *, first: str = '') -> str:
        folder = tmp_path / str(len(made))
        made.append(folder)
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text.replace('{}', detail), encoding='utf-8')
        with monkeypatch.context() as context:
            context.syspath_prepend(str(folder))
            names = {Path(name).parts[0].removesuffix('.py') for name in files}
            for name in [name for name in sys.modules if name.partition('.')[0] in names]:
                context.delitem(sys.modules, name)
            importlib.invalidate_caches()
            before = set(sys.modules)
            if first:
                importlib.import_module(first)
            found = fingerprint_function(importlib.import_module('mine').fn)
            for name in set(sys.modules) - before:
                del sys.modules[name]
        return found

    return run


@pytest.mark.parametrize(
    'files',
    [
        {'mine.py': 'def fn(example):\n    return {}\n'},
        MINE | {'helper.py': 'def text(example):\n    return {}\n'},
        MINE | {'helper.py': 'from far import away as text\n', 'far.py': 'def away(example):\n    return {}\n'},
        {'mine.py': 'from helper import STYLE\n\n\ndef fn(example):\n    return STYLE\n', 'helper.py': 'STYLE = {}\n'},
        {'mine.py': 'from helper import *\n\n\ndef fn(example):\n    return STYLE\n', 'helper.py': 'STYLE = {}\n'},
        {'mine.py': 'def fn(example):\n    from helper import text\n\n    return text(example)\n',
         'helper.py': 'def text(example):\n    return {}\n'},
        {'mine.py': 'from pack.inner.code import fn\n', 'pack/__init__.py': '', 'pack/inner/__init__.py': '',
         'pack/inner/code.py': 'from .. import near\n\n\ndef fn(example):\n    return near.text\n',
         'pack/near.py': 'text = {}\n'},
        {'mine.py': 'def fn(example):\n    import space.code\n\n    return space.code.text\n',
         'space/code.py': 'text = {}\n'},  # a package without __init__.py
        MINE | {'helper.py': 'from base import Base\n\n\nclass Mine(Base):\n    pass\n\n\ntext = Mine()\n',
                'base.py': 'class Base:\n    def __call__(self, example):\n        return {}\n'},
    ],
)  # fmt: skip
def test_it_changes_with_the_code_wherever_it_stands(hash_of, files) -> None:
    same = {hash_of(files, '1'), hash_of(files, '1')}  # in two folders
    assert len(same) == 1 and hash_of(files, '2') not in same


_VALUES = """import collections, functools, os, re
import numpy as np

VALUE = os.environ['MINE']  # so that the source is the same
TABLE = collections.defaultdict(list, {'a': [{VALUE}, re.compile(VALUE), np.array([1, len(VALUE)])]})


class Style:
    kind = VALUE

    def __init__(self, name):
        self.name = name

    @property
    def shown(self):
        return VALUE


def style():
    return VALUE


@functools.lru_cache
def kept():
    return VALUE


def closed(value):
    def inner(example):
        return value

    return inner


"""


@pytest.mark.parametrize(
    'text',
    [
        'def fn(example):\n    return VALUE\n',
        'def fn(example):\n    return [lambda: TABLE]\n',
        'def fn(example, value=VALUE):\n    return value\n',
        'def fn(example, *, value=VALUE):\n    return value\n',
        'def fn(example):\n    return style()\n',
        'def fn(example):\n    return kept()\n',
        'def fn(example):\n    return Style\n',
        'STYLE = Style(VALUE)\n\n\ndef fn(example):\n    return STYLE.name\n',
        'fn = closed(VALUE)\n',
        'fn = functools.partial(closed, VALUE)\n',
        'fn = functools.partial(closed, value={1, VALUE})\n',
        'fn = Style(VALUE).__init__\n',
        'def fn(example):\n    return 1\n\n\nfn.columns = VALUE\n',
        'import helper\n\nhelper.MODE = VALUE\n\n\ndef fn(example):\n    return helper.MODE\n',
    ],
)
def test_it_changes_with_the_values_that_the_code_refers_to(hash_of, monkeypatch, text) -> None:
    files = {'mine.py': _VALUES + text, 'helper.py': 'MODE = 0\n'}
    found = []
    for value in ('a', 'a', 'bb'):
        monkeypatch.setenv('MINE', value)
        found.append(hash_of(files))
    assert found[0] == found[1] != found[2]


def test_it_does_not_change_with_what_is_not_used(hash_of, monkeypatch) -> None:
    """Nor with what was imported before, or with what cannot be told apart from a copy."""
    text = 'import os, threading\n\nOTHER, LOCK = os.environ["MINE"], threading.Lock()\n\n\ndef fn(example):\n    '
    files = {'mine.py': f'{text}import late\n\n    return late, LOCK\n', 'late.py': '', 'unused.py': '{}'}
    found = set()
    for value, first in (('a', ''), ('b', 'late')):
        monkeypatch.setenv('MINE', value)
        found.add(hash_of(files, value, first=first))
    assert len(found) == 1


def test_a_module_that_does_not_run_is_its_source(hash_of) -> None:
    """Imported on a path that is not taken, it stops nothing."""
    text = 'def fn(example):\n    if example is None:\n        import broken\n\n        return broken\n'
    files = {'mine.py': text, 'broken.py': 'print "{}"\n'}
    assert hash_of(files, '1') == hash_of(files, '1') != hash_of(files, '2')


def test_it_follows_the_version_of_an_installed_package(hash_of, monkeypatch) -> None:
    files = {'mine.py': 'def fn(example):\n    import tokenizers\n\n    return tokenizers\n'}
    found = hash_of(files)
    monkeypatch.setattr(function_hash, '_version', lambda package: {'tokenizers': '99'}.get(package, ''))
    assert hash_of(files) != found


def test_what_refers_to_itself_ends() -> None:
    endless: list = []
    endless.append(endless)
    known: set = set()

    class Known:
        def __init__(self) -> None:
            known.add(self)
            self.all = known

    mine = Known()
    assert fingerprint_function(lambda example: (endless, mine)) == fingerprint_function(
        lambda example: (endless, mine)
    )


def test_it_is_the_same_in_every_process(tmp_path: Path) -> None:
    (tmp_path / 'mine.py').write_text(
        "NAMES = {'a', 'b', 'c', ('d', 1), frozenset('efgh')}\nMAP = {name: 1 for name in ('x', 'y')}\n\n\n"
        'def fn(example):\n    return NAMES, MAP, object(), len\n'
    )
    code = 'import mine; from xtuner.dataset.cache.function_hash import fingerprint_function as f; print(f(mine.fn))'
    found = set()
    for seed in ('0', '1', '2'):
        environment = os.environ | {'PYTHONHASHSEED': seed, 'PYTHONPATH': f'{tmp_path}{os.pathsep}{ROOT}'}
        command = [sys.executable, '-c', code]
        found.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(found) == 1 and len(found.pop()) == 33
