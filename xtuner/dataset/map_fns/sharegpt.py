"""ShareGPT: `conversations` with `from` and `value`; `system` and `tools` beside it where there are some."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn
from xtuner.errors import DataError


@map_fn('conversations')
def sharegpt_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """Renames `from` and `value` (or takes `role` and `content`), and puts a `system` text first."""
    turns = example['conversations']
    if not isinstance(turns, list):
        raise DataError(f'`conversations` must be a list, got {type(turns).__name__}')
    messages = [_message(turn, index) for index, turn in enumerate(turns)]
    if example.get('system'):
        messages.insert(0, {'role': 'system', 'content': example['system']})
    return {'messages': messages, 'tools': example.get('tools')}


def _message(turn: Any, index: int) -> dict[str, Any]:
    if isinstance(turn, dict) and 'from' in turn and 'value' in turn:
        return {'role': turn['from'], 'content': turn['value'], 'loss': turn.get('loss')}
    if isinstance(turn, dict) and 'role' in turn:
        return turn
    raise DataError(f'`conversations[{index}]` must be a dict with `from` and `value`, got {str(turn)[:60]}')
