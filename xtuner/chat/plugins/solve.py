"""An equation solver, in a process of its own that is ended when it takes too long."""

from __future__ import annotations

import os
import subprocess
import sys

from xtuner.chat.plugins.base import PluginError
from xtuner.chat.plugins.equations import SECONDS

_MOST_CHARACTERS = 1000  # of a result
_PASSED_ON = ('PATH', 'PYTHONPATH', 'HOME', 'SYSTEMROOT', 'LD_LIBRARY_PATH')  # no keys, no tokens


class Solve:
    """`Solve("x^2 = 4")` is `x=-2; x=2`."""

    name, argument = 'Solve', 'equation'

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds

    def run(self, argument: str) -> str:
        """The solutions. Raises PluginError where there are none, or none in time."""
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        command = [sys.executable, '-m', 'xtuner.chat.plugins.equations']
        try:
            done = subprocess.run(
                command, input=argument, capture_output=True, encoding='utf-8', timeout=self._seconds, check=False,
                env=environment,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise PluginError(f'no solution was found within {self._seconds:g} s') from None
        text = done.stdout.strip()
        if done.returncode == 3:
            raise PluginError(text)
        if done.returncode or not text:
            raise PluginError('the solver gave up: the equation is too large for it')
        if len(text) > _MOST_CHARACTERS:
            raise PluginError(f'the solution has {len(text)} characters, more than {_MOST_CHARACTERS}')
        return text
