"""Ctrl-C at any moment of a command's start: status 130 and one quiet line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

# A library that passes over the interrupt while it is imported, as torch does with numpy's; then the command fails.
CARELESS = """
import os, signal
try:
    import interrupted_here
except BaseException:
    pass
"""
INTERRUPTED = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
for _ in range(1000):
    pass
"""
COMMAND = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from xtuner.cli.main import COMMANDS, Command, main
COMMANDS['careless'] = Command(sys.argv[1], '')
sys.exit(main(['careless']))
"""
WORKING = """
import os, signal
def add_arguments(parser): pass
def run(args):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000): pass
    except KeyboardInterrupt:
        print('noticed', flush=True)
        raise
"""


def run(folder: Path, module: str) -> subprocess.CompletedProcess[str]:
    for name, text in (('careless', CARELESS), ('interrupted_here', INTERRUPTED), ('working', WORKING)):
        (folder / f'{name}.py').write_text(text, encoding='utf-8')
    code = f'import sys; sys.path.insert(0, {str(folder)!r})\n{COMMAND}'
    return subprocess.run([sys.executable, '-c', code, module], capture_output=True, text=True, check=False)


def test_an_interrupt_that_a_library_passes_over_ends_the_command(tmp_path: Path) -> None:
    done = run(tmp_path, 'careless')
    assert (done.returncode, done.stderr) == (130, 'xtuner: interrupted\n')


def test_an_interrupt_while_working_is_an_exception(tmp_path: Path) -> None:
    done = run(tmp_path, 'working')
    assert (done.returncode, done.stdout, done.stderr) == (130, 'noticed\n', 'xtuner: interrupted\n')


LEAVING = """
from xtuner.cli.main import COMMANDS, Command, command
COMMANDS['speaking'] = Command('speaking', '')
sys.argv = ['xtuner', 'speaking']
command()
"""
SPEAKING = """
def add_arguments(parser): pass
def run(args):
    print('a result')
    raise {error}
"""


@pytest.mark.parametrize(
    ('error', 'status', 'told'),
    [
        ("ValueError('no')", 1, 'xtuner: error: unexpected ValueError: no (run again with --debug for the traceback)'),
        ('KeyboardInterrupt', 130, 'xtuner: interrupted'),
        # Not of our own output, but of a worker's pipe, say.
        ("BrokenPipeError(32, 'Broken pipe')", 1, 'xtuner: error: unexpected BrokenPipeError: [Errno 32] Broken pipe '
                                                  '(run again with --debug for the traceback)'),
    ],
)  # fmt: skip
def test_what_was_printed_before_an_error_is_not_lost(tmp_path: Path, error: str, status: int, told: str) -> None:
    (tmp_path / 'speaking.py').write_text(SPEAKING.format(error=error), encoding='utf-8')
    code = f'import sys; sys.path.insert(0, {str(tmp_path)!r})\n{LEAVING}'
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (status, 'a result\n', f'{told}\n')


STARTED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
from xtuner.cli.main import command
print('started', flush=True)
command()
"""


@pytest.mark.slow
def test_at_sixty_moments_of_the_start(tiny_internlm: Path) -> None:
    """Imports and loading take some seconds, then the chat waits for a line."""
    words = ['chat', str(tiny_internlm), '--prompt-template', 'internlm_chat']
    for moment in range(60):
        process = subprocess.Popen(
            [sys.executable, '-c', STARTED, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == 'started\n'
        time.sleep(moment * 0.07)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err.splitlines()[-1:]) == (130, ['xtuner: interrupted']), (moment, err)
