"""Packages import only packages before them, and no module imports itself through others; late imports count."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import xtuner

pytestmark = pytest.mark.unit

PACKAGE = Path(xtuner.__file__).parent
ORDER = ['aliases', 'errors', 'ranks', 'utils', 'registry', 'config', 'dataset', 'parallel', 'kernels', 'model']
ORDER += ['adapters', 'fused', 'inference', 'memory', 'tracking', 'objectives', 'convert', 'engine']
ORDER += ['chat', 'serve', 'cli']
# `model.chat(...)` and `model.stream_chat(...)` are methods of InternLM's model classes, as on its model cards. They
# decode, which is a later package's work.
FACADE = 'xtuner.model.families.chat_api'
FORBIDDEN = {'chat': {'engine', 'convert'}, 'serve': {'engine', 'convert'}}
MOST_FILES = 17  # side by side in a folder; map_fns and cli hold one file for each format and command

FILES = {
    '.'.join(('xtuner', *path.relative_to(PACKAGE).with_suffix('').parts)).removesuffix('.__init__'): path
    for path in sorted(PACKAGE.rglob('*.py'))
    if '.configs.' not in str(path)
}


def imports(name: str) -> set[str]:
    """Our modules that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = {f'{node.module}.{alias.name}' for alias in node.names}
            found |= {module if module in FILES else node.module for module in modules}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {module for module in found if module in FILES and module != name}


def package_of(name: str) -> str:
    return name.split('.')[1] if '.' in name else 'aliases'


GRAPH = {name: imports(name) for name in FILES}


def test_every_package_has_its_place() -> None:
    assert {package_of(name) for name in FILES} == set(ORDER)


@pytest.mark.parametrize('package', ORDER)
def test_a_package_imports_only_packages_before_it(package: str) -> None:
    allowed = set(ORDER[: ORDER.index(package) + 1]) - FORBIDDEN.get(package, set())
    wrong = {
        name: later
        for name in FILES
        if package_of(name) == package and name != FACADE
        if (later := {module for module in GRAPH[name] if package_of(module) not in allowed})
    }
    assert not wrong


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: modules for name, modules in GRAPH.items() if name != FACADE}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(' -> '.join(error.args[1]))


def test_the_facade_alone_imports_a_later_package() -> None:
    later = {package_of(module) for module in GRAPH[FACADE]} - set(ORDER[: ORDER.index('model') + 1])
    assert later == {'inference'}


def test_no_folder_is_too_full() -> None:
    folders = {path.parent for path in FILES.values()} - {PACKAGE / 'cli', PACKAGE / 'dataset' / 'map_fns'}
    full = {str(f.relative_to(PACKAGE)): n for f in folders if (n := len(list(f.glob('*.py')))) > MOST_FILES}
    assert not full
