"""An equation solver in a separate process with a timeout."""

from __future__ import annotations

import os
import subprocess
import sys

from xtuner.chat.plugins.base import PluginError
from xtuner.chat.plugins.equations import SECONDS

_MAX_CHARACTERS = 1000  # of a result
_ENVIRONMENT = ('PATH', 'PYTHONPATH', 'HOME', 'SYSTEMROOT', 'LD_LIBRARY_PATH')  # contains no secrets


class Solve:
    """`Solve("x^2 = 4")` returns `x=-2; x=2`."""

    name, argument = 'Solve', 'equation'

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds

    def run(self, argument: str) -> str:
        """The solutions. Raises PluginError if there are none, or on timeout."""
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
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
            raise PluginError('the solver ran out of time or memory: the equation is too large')
        if len(text) > _MAX_CHARACTERS:
            raise PluginError(f'the solution has {len(text)} characters, more than {_MAX_CHARACTERS}')
        return text
