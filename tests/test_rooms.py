"""Rooms import only rooms before them, as docs/design.md says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import xtuner

PACKAGE = Path(xtuner.__file__).parent
ORDER = ['errors', 'escape', 'files', 'fields', 'ranks', 'processes', 'host_memory', 'registry', 'config', 'dataset']
ORDER += ['model', 'engine']
ALLOWED = {room: set(ORDER[: i + 1]) for i, room in enumerate(ORDER)}
ALLOWED['convert'] = ALLOWED['model'] | {'convert'}
ALLOWED['chat'] = ALLOWED['model'] | {'chat'}
ALLOWED['serve'] = ALLOWED['model'] | {'chat', 'serve'}


def imported_rooms(file: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split('.')[1] for name in names if name.startswith('xtuner.')}
    return rooms


@pytest.mark.parametrize('room', sorted(ALLOWED))
def test_a_room_imports_only_rooms_before_it(room: str) -> None:
    path = PACKAGE / room
    files = list(path.rglob('*.py')) if path.is_dir() else [path.with_suffix('.py')]
    assert files
    wrong = {str(f.relative_to(PACKAGE)): extra for f in files if (extra := imported_rooms(f) - ALLOWED[room])}
    assert not wrong
