"""The return format of map functions: `conversation`, a list of `system`, `input` and `output`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn
from xtuner.dataset.map_fns.turns import system_text


@map_fn('conversation')
def conversation_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """Returns the turns unchanged; any of them may have `system`, and `loss` next to `output`."""
    return {'conversation': example['conversation'], 'system': system_text(example), 'tools': example.get('tools')}
