"""The tiers of docs/testing.md: a unit test that imports torch fails, however it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

UNIT = 'import pytest\npytestmark = pytest.mark.unit\n'
TESTS = {
    'at the top': 'import transformers\ndef test_it(): pass\n',
    'in a test': 'def test_it():\n    import torch\n',
    'where errors are hidden': 'def test_it():\n    try: import torch.nn\n    except Exception: pass\n',
    'by name': "import importlib\ndef test_it():\n    importlib.import_module('torch')\n",
}


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    place = ['-c', str(ROOT / 'pyproject.toml'), '--rootdir', str(folder), str(folder)]
    command = [sys.executable, '-m', 'pytest', '-p', 'tests.conftest', *place, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize('body', TESTS.values(), ids=TESTS)
def test_a_unit_test_that_imports_torch_fails(tmp_path: Path, body: str) -> None:
    (tmp_path / 'test_it.py').write_text(UNIT + body)
    result = run(tmp_path, '--unit')
    assert result.returncode in (1, 2), result.stdout
    assert 'a unit test imports t' in result.stdout


def test_other_tests_are_not_even_imported(tmp_path: Path) -> None:
    tests = 'def test_a(): pass\n@pytest.mark.torch\ndef test_b(): import torch\n'
    (tmp_path / 'test_unit.py').write_text(UNIT + tests)
    (tmp_path / 'other').mkdir()
    for name in ('conftest.py', 'test_other.py'):
        (tmp_path / 'other' / name).write_text('import torch\n')
    result = run(tmp_path, '--unit')
    assert result.returncode == 0 and '1 passed, 1 deselected' in result.stdout, result.stdout


def test_slow_real_and_gpu_tests_are_asked_for_by_name(tmp_path: Path) -> None:
    kinds = ('slow', 'real', 'gpu')
    tests = ''.join(f'@pytest.mark.{kind}\ndef test_{kind}(): pass\n' for kind in kinds)
    (tmp_path / 'test_it.py').write_text('import pytest\n' + tests + 'def test_plain(): pass\n')
    assert '1 passed, 3 deselected' in run(tmp_path).stdout
    assert '1 passed, 3 deselected' in run(tmp_path, '-m', 'real').stdout
