"""One dict of a classical config; every key must be translated, ignored with a note, or rejected."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Findings:
    """Results of a translation: faults are errors, notes are messages to the user."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Adds a note, once."""
        if text not in self.notes:
            self.notes.append(text)


class Section:
    """A dict of the file.

    Args:
        values: The dict; anything else is a fault.
        where: Its dotted path, such as `optim_wrapper.optimizer`, for messages.
        findings: Collects faults and notes.
    """

    def __init__(self, values: Any, where: str, findings: Findings) -> None:
        if not isinstance(values, Mapping):
            findings.faults.append(f'`{where}` must be a dict, got {values!r}')
            values = {}
        self.values = dict(values)
        self._unread = dict(values)
        self.where = where
        self.findings = findings

    def take(self, key: str, default: Any = None) -> Any:
        """Returns a value and marks its key as read."""
        return self._unread.pop(key, default) if key in self._unread else self.values.get(key, default)

    def need(self, key: str) -> Any:
        """Returns a required value."""
        if key not in self.values:
            self.fault(f'`{self.path(key)}` is missing')
        return self.take(key)

    def section(self, key: str) -> Section:
        """Returns a nested dict; an empty one if it is missing or None."""
        values = self.take(key)
        return Section({} if values is None else values, self.path(key), self.findings)

    def type(self, *allowed: str, default: str = '') -> str:
        """Returns the name of `type`, such as 'AmpOptimWrapper', which must be one of `allowed`."""
        name = type_name(self.take('type', default))
        if name not in allowed:
            self.fault(f'`{self.path("type")}` is {name or "missing"}; supported: {", ".join(allowed)}')
        return name

    def ignore(self, why: str, *keys: str) -> None:
        """Ignores keys without effect, with a note about those that are set."""
        paths = [self.path(key) for key in keys if self.take(key) not in (None, False)]
        if paths:
            self.findings.note(f'no effect: {", ".join(paths)} ({why})')

    def refuse(self, why: str, *keys: str) -> None:
        """Adds a fault for each of these keys that is set."""
        for key in keys:
            value = self.take(key)
            if value not in (None, False, {}, []):
                self.fault(f'`{self.path(key)}` = {_short(value)}: {why}')

    def close(self) -> None:
        """Adds a fault for every unread key."""
        for key, value in self._unread.items():
            self.fault(f'`{self.path(key)}` = {_short(value)} is not supported, and ignoring it could change the '
                       'result')  # fmt: skip
        self._unread = {}

    def leftovers(self) -> dict[str, Any]:
        """Returns the unread keys; at the top level of a file these are its helper variables."""
        return dict(self._unread)

    def fault(self, text: str) -> None:
        """Adds a fault."""
        self.findings.faults.append(text)

    def path(self, key: str) -> str:
        """Returns the dotted path of a key."""
        return f'{self.where}.{key}' if self.where else key

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None


def type_name(value: Any) -> str:
    """The name of a type: 'AdamW' for 'torch.optim:AdamW', 'AutoTokenizer.from_pretrained' for a method of a class.

    Files written by old runs contain 'torch.optim.AdamW'.
    """
    if callable(value):
        value = f'{value.__module__}:{value.__qualname__}'
    module, _, name = str(value or '').replace(':', '.').rpartition('.')
    owner = module.rpartition('.')[2]
    return f'{owner}.{name}' if owner[:1].isupper() else name


def imported(text: Any) -> Any:
    """The value of 'module.NAME:attribute', e.g. of `SYSTEM_TEMPLATE.alpaca` in a file; other values are unchanged."""
    if not isinstance(text, str) or not text.startswith('xtuner.') or ':' not in text:
        return text
    path, _, attribute = text.partition(':')
    module, _, name = path.rpartition('.')
    return getattr(getattr(importlib.import_module(module), name), attribute)


def _short(value: Any, max_length: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= max_length else text[: max_length - 1] + '…'
