"""Measures of a source tree, on a small one."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.structure import cycles, duplicate_classes, functions, import_graph, mirrored, read_modules

pytestmark = pytest.mark.unit

FILES = {
    'xtuner/__init__.py': '',
    'xtuner/a/__init__.py': '',
    'xtuner/a/one.py': 'from xtuner.a import two\n\n\nclass Same:\n    pass\n',
    'xtuner/a/two.py': 'def late():\n    from xtuner.b import three\n    return three\n\n\nclass _Same:\n    pass\n',
    'xtuner/b/__init__.py': '',
    'xtuner/b/three.py': 'import xtuner.a.one\n\nvalue = 1\n',
    'xtuner/b/four.py': 'import xtuner.a.one\n',
    'xtuner/configs/c.py': 'import xtuner.a.one\n',
    'tests/a/test_one.py': '',
    'tests/test_three.py': '',
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_late_import_closes_a_cycle(tree: Path) -> None:
    assert cycles(import_graph(read_modules(tree))) == [['xtuner.a.one', 'xtuner.a.two', 'xtuner.b.three']]


def test_classes_of_one_name_are_found_whether_private_or_not(tree: Path) -> None:
    assert duplicate_classes(read_modules(tree)) == {'Same': ['xtuner.a.one', 'xtuner.a.two']}


def test_a_test_mirrors_its_module_only_in_the_same_folder(tree: Path) -> None:
    with_test, without = mirrored(tree, read_modules(tree))
    assert with_test == ['xtuner.a.one']
    assert without == ['xtuner.a.two', 'xtuner.b.four', 'xtuner.b.three']


def test_the_longest_function_is_named(tree: Path) -> None:
    assert max(functions(read_modules(tree))) == (3, 'xtuner.a.two.late')
