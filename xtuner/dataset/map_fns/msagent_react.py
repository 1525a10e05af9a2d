"""MSAgent-Bench in ReAct format: `conversations` with `from` and `value`, where the assistant calls plugins.

An answer that calls a plugin holds `<|startofthink|>{"api_name": ..., "parameters": ...}<|endofthink|>`, and the
plugin's result follows as `<|startofexec|>...<|endofexec|>`. Both become ReAct text:

    Thought: ...          written by the model
    Action: search        written by the model
    Action Input: {...}   written by the model
    Response: ...         the result, given to the model as the next user message
    Final Answer: ...     written by the model
"""

from __future__ import annotations

import json
import re
from typing import Any

from xtuner.dataset.map_fns.registration import map_fn, never
from xtuner.dataset.map_fns.turns import training_fields
from xtuner.errors import DataError

_CALL = re.compile(r'<\|startofthink\|>(.*?)<\|endofthink\|>', re.DOTALL)
_RESULT = re.compile(r'<\|startofexec\|>(.*?)<\|endofexec\|>', re.DOTALL)
_SYSTEM = """You may call tools. They are:
{tools}
To call one, write a line `Thought:` with why, a line `Action:` with its name, and a line `Action Input:` with its
arguments as JSON; then wait for its `Response:`. Once you can answer, write `Thought:` and then `Final Answer:`."""


@map_fn('conversations', detect=never)
def msagent_react_map_fn(example: dict[str, Any]) -> dict[str, Any] | None:
    """Parses the record's JSON, splits answers at their plugin calls, and returns ReAct text."""
    turns = example['conversations']
    turns = _json(turns, 'conversations') if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get('value'), str) for t in turns):
        raise DataError('`conversations` must be a list of dicts with `from` and `value`')
    messages: list[dict[str, Any]] = []
    for turn in turns:
        role, text = turn.get('from'), turn['value'].strip()
        first = len(messages)
        if role == 'system':
            messages.append({'role': 'system', 'content': _SYSTEM.format(tools=text)})
        elif role == 'user':
            messages.append({'role': 'user', 'content': text})
        elif role == 'assistant':
            messages += _answer(text)
        else:
            raise DataError(f'`from` must be system, user or assistant, got {role!r}')
        for message in messages[first:]:
            message |= training_fields(turn, ('from', 'value'))
    return {'messages': messages} if messages else None


def _answer(text: str) -> list[dict[str, Any]]:
    """Splits an answer at its calls: a call ends a message of the model, and its result becomes a user message."""
    messages: list[dict[str, Any]] = []
    done = 0
    for call in _CALL.finditer(text):
        messages.append({'role': 'assistant', 'content': _call(text[done : call.start()].strip(), call.group(1))})
        result = _RESULT.search(text, call.end())
        if result is None:
            raise DataError('a plugin call is not followed by a `<|startofexec|>` result')
        messages.append({'role': 'user', 'content': f'Response: {result.group(1).strip()}'})
        done = result.end()
    rest = text[done:].strip()
    if rest:
        thought = 'Thought: I know the answer now.\n' if messages else 'Thought: I need no tool for this.\n'
        messages.append({'role': 'assistant', 'content': f'{thought}Final Answer: {rest}'})
    elif messages:  # the answer ends with a result and no text after it
        messages.pop()
    return messages


def _call(thought: str, text: str) -> str:
    call = _json(re.sub(r'^```(?:JSON|json)?|```$', '', text.strip()).strip(), 'a plugin call')
    if not isinstance(call, dict) or not isinstance(call.get('api_name'), str):
        raise DataError(f'a plugin call must be JSON with `api_name`, got {text.strip()[:60]!r}')
    arguments = json.dumps(call.get('parameters', {}), ensure_ascii=False)
    return f'Thought: {thought or "I need a tool for this."}\nAction: {call["api_name"]}\nAction Input: {arguments}'


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f'{name} is not JSON: {error}') from None
