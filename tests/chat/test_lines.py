"""Messages of several lines, and the history file."""

from __future__ import annotations

import stat
import sys
from pathlib import Path
from types import ModuleType

import pytest

from xtuner.chat.lines import line_editing, read_message

pytestmark = pytest.mark.unit


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


@pytest.mark.parametrize(('names', 'bound'), [
    ({'__doc__': 'Importing this module enables editing using libedit readline.'}, ['bind ^I rl_complete']),
    ({'backend': 'editline'}, ['bind ^I rl_complete']),
    ({'backend': 'readline'}, ['tab: complete', 'set enable-bracketed-paste on']),
])  # fmt: skip
def test_the_tab_key_is_bound_in_the_form_of_the_library(
    names: dict[str, str], bound: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """macOS's Python has libedit, which takes GNU's form for nothing."""
    module = ModuleType('readline', '')
    said: list[str] = []
    for name in ('clear_history', 'read_history_file', 'set_history_length', 'write_history_file', 'set_completer',
                 'set_completer_delims', 'get_completer', 'get_completer_delims'):  # fmt: skip
        setattr(module, name, lambda *_: None)
    for name, value in ({'parse_and_bind': said.append} | names).items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, 'readline', module)
    with line_editing(['/help'], tmp_path / 'history'):
        pass
    assert said == bound
