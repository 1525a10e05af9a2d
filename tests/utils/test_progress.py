"""Progress: lines in a file, a bar on a terminal, nothing on other ranks."""

from __future__ import annotations

import io
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from xtuner.cli.log import start_logging
from xtuner.utils import progress
from xtuner.utils.progress import Progress, above_bars, close_bars

pytestmark = pytest.mark.unit


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(Progress, 'clock', found)
    return found


@contextmanager
def on_a_terminal() -> Iterator[Terminal]:
    """A terminal in place of stderr, on which bars are drawn at once; no fixture, since pytest sets stderr anew."""
    with pytest.MonkeyPatch.context() as patch:
        terminal = Terminal()
        patch.setattr('sys.stderr', terminal)
        patch.setattr(progress, '_DELAY_S', 0)
        try:
            yield terminal
        finally:
            close_bars()


def test_a_line_every_few_seconds_says_how_long_it_will_take(
    clock: Clock, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, 'xtuner')
    bar = Progress(range(10), desc='Loading weights')
    for _ in bar:
        clock.now += 3
    bar.set_postfix(anything=1)
    bar.close()
    assert caplog.messages == [
        'Loading weights: 20 % · eta 0:00:24',
        'Loading weights: 40 % · eta 0:00:18',
        'Loading weights: 60 % · eta 0:00:12',
        'Loading weights: 80 % · eta 0:00:06',
    ]
    assert '\r' not in capsys.readouterr().err


def test_bytes_have_amounts_and_speed(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, 'xtuner')
    with Progress(total=8_000_000_000, desc='writing', unit='B') as bar:
        clock.now += 10
        bar.update(2_000_000_000)
    assert caplog.messages == ['writing: 25 % · 2.0 GB of 8.0 GB · 200.0 MB/s · eta 0:00:30']


def test_a_resumed_count_does_not_make_the_speed(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, 'xtuner')
    with Progress(total=100, initial=80, desc='steps') as bar:
        clock.now += 10
        bar.update(10)
    assert caplog.messages == ['steps: 90 % · eta 0:00:10']


def test_without_a_total_there_is_a_count_and_no_eta(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, 'xtuner')
    with Progress(desc='reading', unit='records') as bar:
        for _ in range(1280):
            clock.now += 1 / 128
            bar.update()
    assert caplog.messages == ['reading: 640 records', 'reading: 1,280 records']


def test_quick_work_and_other_ranks_say_nothing(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, 'xtuner')
    assert list(Progress(range(3), 'quick')) == [0, 1, 2]
    monkeypatch.setenv('RANK', '1')
    for _ in Progress(range(10), 'slow'):
        clock.now += 10
    assert not caplog.messages


def test_work_that_logs_its_own_lines_has_none(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, 'xtuner')
    for _ in Progress(range(10), 'steps', lines=False):
        clock.now += 10
    assert not caplog.messages


def test_a_bar_on_a_terminal_is_erased_at_the_end() -> None:
    with on_a_terminal() as terminal, Progress(total=4, desc='a\x1b[31m', unit='steps') as bar:
        bar.update(2)
        bar.refresh()
        assert '50%' in terminal.getvalue() and 'steps/s' in terminal.getvalue()
        assert '\x1b[31m' not in terminal.getvalue()
        bar.close()
        assert terminal.getvalue().rpartition('\r')[2].strip() == ''
        assert '\n' not in terminal.getvalue()


def test_a_log_line_stands_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    project = logging.getLogger('xtuner')
    for name in ('handlers', 'propagate', 'level'):
        monkeypatch.setattr(project, name, getattr(project, name))
    start_logging()
    with on_a_terminal() as terminal, Progress(total=4, desc='work') as bar:
        bar.refresh()
        project.info('hello')
        before, _, after = terminal.getvalue().partition('hello\n')
    assert before.rpartition('\r')[2].endswith('  ')  # the time only: the bar is gone
    assert 'work' in after


def test_an_error_leaves_no_bar_behind() -> None:
    with on_a_terminal() as terminal:
        bar = Progress(total=4, desc='work')
        bar.refresh()
        close_bars()
        assert 'work' in terminal.getvalue() and terminal.getvalue().rpartition('\r')[2].strip() == ''
        before = terminal.getvalue()
        bar.update()
        with above_bars():
            pass
        assert terminal.getvalue() == before


def test_threads_lose_no_count(clock: Clock) -> None:
    with Progress(total=40_000) as bar:
        threads = [threading.Thread(target=lambda: [bar.update() for _ in range(10_000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert bar.n == 40_000


def test_a_fork_draws_no_bar_of_its_parent() -> None:
    with on_a_terminal() as terminal:
        bar = Progress(total=4, desc='work')
        bar.refresh()
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with Progress.get_lock():
                held.set()
                release.wait()

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        child = os.fork()
        if not child:
            before = terminal.getvalue()
            with above_bars(), Progress(total=1):
                pass
            os._exit('work' in terminal.getvalue()[len(before) :])
        release.set()
        holder.join()
        assert os.waitpid(child, 0)[1] == 0
