"""OpenAI: `messages` with `role` and `content`, and optional `system` (or `system_prompt`) and `tools`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn
from xtuner.dataset.map_fns.turns import system_text


@map_fn('messages')
def openai_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """Returns messages, system text and tools unchanged."""
    return {'messages': example['messages'], 'system': system_text(example), 'tools': example.get('tools')}
