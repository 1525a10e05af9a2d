"""OpenAI: `messages` with `role` and `content`, and `system` and `tools` where there are some."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn


@map_fn('messages')
def openai_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """Passes messages, system text and tools on as they are."""
    return {'messages': example['messages'], 'system': example.get('system'), 'tools': example.get('tools')}
