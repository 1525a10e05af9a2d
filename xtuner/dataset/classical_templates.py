"""Templates that classical configs import from `xtuner.utils`: `PROMPT_TEMPLATE.alpaca`, `SYSTEM_TEMPLATE.alpaca`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.systems import SYSTEM_TEMPLATE as SYSTEMS
from xtuner.dataset.templates.builtin import TEMPLATES


class _Names:
    """Looks up names as attributes or keys; an error lists the known names."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def _values(self) -> dict[str, Any]:
        return TEMPLATES.module_dict if self._kind == 'prompt' else SYSTEMS

    def __getattr__(self, name: str) -> Any:
        values = self._values()
        if name.startswith('__') or name not in values:
            raise AttributeError(f'there is no {self._kind} template {name!r}; known: {", ".join(sorted(values))}')
        return values[name]

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except AttributeError as error:
            raise KeyError(str(error)) from None

    def __iter__(self) -> Any:
        return iter(self._values())


PROMPT_TEMPLATE = _Names('prompt')
SYSTEM_TEMPLATE = _Names('system')
