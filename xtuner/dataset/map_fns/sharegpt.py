"""ShareGPT: `conversations` with `from` and `value`, and `system` (`system_prompt`) and `tools` if any."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn
from xtuner.dataset.map_fns.turns import message, system_text
from xtuner.errors import DataError
from xtuner.utils.fields import shown


@map_fn('conversations')
def sharegpt_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """Renames `from` and `value` (or takes `role` and `content`) and puts a `system` text first."""
    turns = example['conversations']
    if not isinstance(turns, list):
        raise DataError(f'`conversations` must be a list, got {type(turns).__name__}')
    messages = [_message(turn, index) for index, turn in enumerate(turns)]
    return {'messages': messages, 'system': system_text(example), 'tools': example.get('tools')}


def _message(turn: Any, index: int) -> Any:
    if isinstance(turn, dict) and ('role' in turn or {'from', 'value'} <= turn.keys()):
        return message(turn)
    hint = '; plain texts do not say who speaks: write your own map function' if isinstance(turn, str) else ''
    raise DataError(f'`conversations[{index}]` must be a dict with `from` and `value`, got {shown(turn)}{hint}')
