"""What a plugin is."""

from __future__ import annotations

from typing import Protocol


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
