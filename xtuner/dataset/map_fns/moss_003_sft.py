"""MOSS-003 SFT with plugins: `chat`, by turn, with thoughts, commands and results besides question and answer.

    <|Human|>: ...<eoh>  <|Inner Thoughts|>: ...<eot>  <|Commands|>: ...<eoc>  <|Results|>: ...<eor>  <|MOSS|>: ...<eom>

The record's texts contain the markers; they are removed here and inserted again, as ids, by the template `moss_sft`.
Results come from a tool, so they are not trained.
"""

from __future__ import annotations

import re
from typing import Any

from xtuner.dataset.map_fns.registration import map_fn
from xtuner.dataset.map_fns.turns import training_fields
from xtuner.dataset.mapping.unread_fields import is_empty
from xtuner.errors import DataError

_PARTS = (('Human', 'user'), ('Inner Thoughts', 'thoughts'), ('Commands', 'commands'), ('Tool Responses', 'tool'),
          ('MOSS', 'assistant'))  # fmt: skip
_MARKED = re.compile(r'\s*<\|[A-Z][A-Za-z ]*\|>: ?(.*?)(?:<eo[hcrtm]>)?\s*', re.DOTALL)
_NOTHING = 'None'  # the text of an empty part


@map_fn('chat')
def moss_003_sft_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """Returns all parts of all turns; empty parts keep their `None`, which MOSS learned to write."""
    chat = example['chat']
    if not isinstance(chat, dict) or not chat:
        raise DataError(f'`chat` must be a dict of turns, got {str(chat)[:60]!r}')
    messages = []
    if example.get('meta_instruction'):
        messages.append({'role': 'system', 'content': example['meta_instruction']})
    turns = {name: turn for name, turn in chat.items() if not is_empty(turn)}
    for name, turn in sorted(turns.items(), key=lambda item: _number(item[0])):
        if not isinstance(turn, dict) or not {'Human', 'MOSS'} <= set(turn):
            raise DataError(f'`chat.{name}` must hold `Human` and `MOSS`, got {str(turn)[:60]!r}')
        for part, role in _PARTS:
            if turn.get(part) is not None:
                content = _content(turn[part], f'chat.{name}.{part}')
                nothing = _NOTHING if role in ('thoughts', 'commands', 'tool') else ''
                messages.append({'role': role, 'content': content or nothing})
        if others := training_fields(turn, {part for part, _ in _PARTS}):
            messages[-1] |= others
    return {'messages': messages}


def _content(text: Any, name: str) -> str:
    match = _MARKED.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise DataError(f'`{name}` must be `<|...|>: text<eo.>`, got {str(text)[:60]!r}')
    return match.group(1).strip()


def _number(name: str) -> int:
    match = re.fullmatch(r'turn_(\d+)', name)
    if match is None:
        raise DataError(f'`chat` has the key {name!r}; expected `turn_` and a number')
    return int(match.group(1))
