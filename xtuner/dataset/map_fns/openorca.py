"""OpenOrca: `system_prompt`, `question`, `response`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn


@map_fn('system_prompt', 'question', 'response')
def openorca_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The question is given with the record's own system message; the response is trained."""
    turn = {'system': example['system_prompt'], 'input': example['question'], 'output': example['response']}
    return {'conversation': [turn], 'tools': example.get('tools')}
