"""Creates plugins from their names on the command line."""

from __future__ import annotations

from collections.abc import Sequence

from xtuner.chat.plugins.base import Plugin
from xtuner.errors import UsageError, nearest

NAMES = ('calculate', 'solve', 'search')


def open_plugins(names: Sequence[str]) -> list[Plugin]:
    """Creates each plugin once.

    Raises:
        UsageError: a name is unknown, or a plugin needs an environment variable that is not set.
    """
    for name in names:
        if name not in NAMES:
            raise UsageError(f'unknown plugin {name!r}{nearest(name, NAMES)}; available: {", ".join(NAMES)}')
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
