"""A process is called ended only where that is known."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from xtuner.utils import processes
from xtuner.utils.processes import has_ended, is_visible, this_process

pytestmark = pytest.mark.unit

linux = pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')


def changed(word: int, value: str) -> str:
    words = this_process().split()
    words[word] = value
    return ' '.join(words)


def named(pid: int) -> str:
    return f'{processes._pid_scope()} {pid} {processes._start_time(pid)}'


def test_this_process_lives() -> None:
    assert is_visible(this_process()) and not has_ended(this_process())


@linux
def test_a_killed_process_has_ended_before_and_after_its_parent_waits_for_it() -> None:
    child = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'], stdin=subprocess.PIPE)
    name = named(child.pid)
    assert not has_ended(name)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie: it has ended, and its number is still taken
    assert has_ended(name)
    child.communicate()
    assert has_ended(name)


@linux
@pytest.mark.parametrize('word', [0, 1, 2])
def test_a_missing_number_elsewhere_tells_nothing(word: int) -> None:
    child = subprocess.Popen([sys.executable, '-c', ''])
    name = named(child.pid)
    child.wait()
    assert has_ended(name)
    elsewhere = name.split()
    elsewhere[word] = 'other'
    assert not has_ended(' '.join(elsewhere)) and not is_visible(' '.join(elsewhere))


@linux
def test_a_number_that_another_process_has_now_is_no_sign_of_life() -> None:
    assert has_ended(changed(4, '1'))


@pytest.mark.parametrize('text', ['', 'host 12', 'a b c d e', 'host boot space 99999999999999999999999999 -', '\0'])
def test_a_text_of_another_form_tells_nothing(text: str) -> None:
    assert not has_ended(text)


@linux
def test_an_unknown_namespace_is_never_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    processes._pid_scope.cache_clear()
    monkeypatch.setattr(processes, '_PROC', processes._PROC / 'absent')
    try:
        assert not is_visible(this_process()) and not has_ended(changed(3, '999999999'))
    finally:
        processes._pid_scope.cache_clear()


@linux
def test_a_number_beyond_what_the_system_has_tells_nothing() -> None:
    assert not has_ended(changed(3, '9' * 30))
