"""The interface of plugins."""

from __future__ import annotations

from typing import Protocol


class Plugin(Protocol):
    """A tool. `name` is the function that the model calls, `argument` the name of its parameter in the prompt."""

    name: str
    argument: str

    def run(self, argument: str) -> str:
        """The result, as text.

        Raises:
            PluginError: there is no result; the model receives the message.
        """


class PluginError(Exception):
    """A tool has no result; the message is shown to the model and to the user."""
