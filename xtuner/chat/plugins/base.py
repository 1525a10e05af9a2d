"""What a plugin is, and how one is found by its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from xtuner.errors import UsageError, nearest

NAMES = ('calculate', 'solve', 'search')


class Plugin(Protocol):
    """A tool. `name` is the function that the model calls, `argument` what its parameter is called in its prompt."""

    name: str
    argument: str

    def run(self, argument: str) -> str:
        """The result, as text.

        Raises:
            PluginError: there is none; the model is told why.
        """


class PluginError(Exception):
    """A tool has no result; the text says why, to the model and to the user."""


def open_plugins(names: Sequence[str]) -> list[Plugin]:
    """Plugins by their names on the command line, each once.

    Raises:
        UsageError: a name is unknown, or a plugin lacks what it needs.
    """
    for name in names:
        if name not in NAMES:
            raise UsageError(f'there is no plugin {name!r}{nearest(name, NAMES)}; known: {", ".join(NAMES)}')
    return [_open(name) for name in dict.fromkeys(names)]


def _open(name: str) -> Plugin:
    if name == 'calculate':
        from xtuner.chat.plugins.calculate import Calculate

        return Calculate()
    if name == 'solve':
        from xtuner.chat.plugins.solve import Solve

        return Solve()
    from xtuner.chat.plugins.search import Search

    return Search.from_environment()
