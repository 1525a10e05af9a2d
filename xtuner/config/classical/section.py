"""One dict of a classical config, of which no key may go unseen: taken, passed over with a word, or refused."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Findings:
    """What a translation met: faults stop it, notes are words for the user."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Adds a note, once."""
        if text not in self.notes:
            self.notes.append(text)


class Section:
    """A dict at a place of the file.

    Args:
        values: The dict; anything else is a fault.
        where: Its place, such as `optim_wrapper.optimizer`, for messages.
        findings: Where faults and notes go.
    """

    def __init__(self, values: Any, where: str, findings: Findings) -> None:
        if not isinstance(values, Mapping):
            findings.faults.append(f'`{where}` must be a dict, got {values!r}')
            values = {}
        self.values = dict(values)
        self._left = dict(values)
        self.where = where
        self.findings = findings

    def take(self, key: str, default: Any = None) -> Any:
        """Returns a value that is understood."""
        return self._left.pop(key, default) if key in self._left else self.values.get(key, default)

    def need(self, key: str) -> Any:
        """Returns a value that must be there."""
        if key not in self.values:
            self.fault(f'`{self.path(key)}` is missing')
        return self.take(key)

    def section(self, key: str) -> Section:
        """Returns a dict within; an empty one where it is missing or None."""
        values = self.take(key)
        return Section({} if values is None else values, self.path(key), self.findings)

    def type(self, *allowed: str, default: str = '') -> str:
        """Returns the last word of `type`, such as 'AmpOptimWrapper', which must be one of `allowed`."""
        name = type_name(self.take('type', default))
        if name not in allowed:
            self.fault(f'`{self.path("type")}` is {name or "missing"}; understood: {", ".join(allowed)}')
        return name

    def pass_over(self, why: str, *keys: str) -> None:
        """Takes keys that change nothing here, with a note for those that are set."""
        found = [self.path(key) for key in keys if self.take(key) not in (None, False)]
        if found:
            self.findings.note(f'no effect here: {", ".join(found)} ({why})')

    def refuse(self, why: str, *keys: str) -> None:
        """Makes a fault of each of these keys that is set."""
        for key in keys:
            value = self.take(key)
            if value not in (None, False, {}, []):
                self.fault(f'`{self.path(key)}` = {_short(value)}: {why}')

    def close(self) -> None:
        """Makes a fault of every key that nobody took."""
        for key, value in self._left.items():
            self.fault(f'`{self.path(key)}` = {_short(value)} is not understood, and leaving it out could change the '
                       'result')  # fmt: skip
        self._left = {}

    def leftovers(self) -> dict[str, Any]:
        """Returns what nobody took: at the top of a file, its own names."""
        return dict(self._left)

    def fault(self, text: str) -> None:
        """Adds a fault."""
        self.findings.faults.append(text)

    def path(self, key: str) -> str:
        """Returns the place of a key."""
        return f'{self.where}.{key}' if self.where else key

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None


def type_name(value: Any) -> str:
    """The last word of a type: 'AdamW' of 'torch.optim:AdamW', 'AutoTokenizer.from_pretrained' of a class's method.

    Files that old runs have written say 'torch.optim.AdamW'.
    """
    if callable(value):
        value = f'{value.__module__}:{value.__qualname__}'
    module, _, name = str(value or '').replace(':', '.').rpartition('.')
    owner = module.rpartition('.')[2]
    return f'{owner}.{name}' if owner[:1].isupper() else name


def imported(text: Any) -> Any:
    """The value behind 'module.NAME:attribute', as a read file has `SYSTEM_TEMPLATE.alpaca`; anything else as it is."""
    if not isinstance(text, str) or not text.startswith('xtuner.') or ':' not in text:
        return text
    path, _, attribute = text.partition(':')
    module, _, name = path.rpartition('.')
    return getattr(getattr(importlib.import_module(module), name), attribute)


def _short(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + '…'
