"""Messages of several lines, and the history file."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from xtuner.chat.lines import line_editing, read_message


def read(*lines: str) -> str:
    waiting = list(lines)

    def next_line(prompt: str) -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    message = read_message('you > ', next_line)
    assert not waiting
    return message


@pytest.mark.parametrize(('lines', 'message'), [
    (['  one  '], 'one'), (['one\\', 'two\\', 'three'], 'one\ntwo\nthree'), (['"""one', '  two', '"""'], 'one\n  two'),
    (['"""', 'one', '', 'two"""'], 'one\n\ntwo'), (['"""one"""'], 'one'), (['"""', '"""'], ''), ([''], ''),
    (['a\nb'], 'a\nb'),
])  # fmt: skip
def test_several_lines(lines: list[str], message: str) -> None:
    assert read(*lines) == message


def test_the_end_of_input_inside_a_message() -> None:
    with pytest.raises(EOFError):
        read('"""one')


def test_the_history_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    readline = pytest.importorskip('readline')
    path = tmp_path / 'new' / 'history'
    with line_editing(['/help'], path):
        readline.add_history('one')
        readline.add_history('界')
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with line_editing(['/help'], path):
        assert [readline.get_history_item(i) for i in (1, 2)] == ['one', '界']
        assert readline.get_completer()('/h', 0) == '/help' and readline.get_completer()('h', 0) is None
