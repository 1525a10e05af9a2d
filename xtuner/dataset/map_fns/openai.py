"""OpenAI: `messages` with `role` and `content`, and `tools` where there are some."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn


@map_fn('messages')
def openai_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """Passes messages and tools on as they are."""
    return {'messages': example['messages'], 'tools': example.get('tools')}
