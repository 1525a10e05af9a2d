"""Checks requests of OpenAI's API: every field is used, known to have no effect here, or rejected by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from xtuner.inference.generate import Sampling
from xtuner.serve.problems import APIError, invalid

# Accepted without effect: they concern OpenAI's billing, storage and caches.
_IGNORED = frozenset({'user', 'metadata', 'store', 'service_tier', 'safety_identifier', 'prompt_cache_key'})
# Unsupported: accepted only with their neutral value.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    'n': (1,),
    'best_of': (1,),
    'frequency_penalty': (0,),
    'presence_penalty': (0,),
    'logit_bias': ({},),
    'logprobs': (False,),
    'top_logprobs': (0,),
    'echo': (False,),
    'suffix': ('',),
    'response_format': ({'type': 'text'},),
    'tools': ([],),
    'tool_choice': ('none', 'auto'),
    'parallel_tool_calls': (True, False),
    'modalities': (['text'],),
}
_COMMON = frozenset({'model', 'stream', 'stream_options', 'max_tokens', 'temperature', 'top_p', 'seed', 'stop'})
_CHAT = _COMMON | {'messages', 'max_completion_tokens'}
_COMPLETION = _COMMON | {'prompt'}
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 4, 256
MAX_PROMPTS = 64


@dataclass(frozen=True)
class Request:
    """A valid request; its length is checked later.

    Attributes:
        model: The name of the requested model.
        prompts: One list of messages (chat); or texts or lists of token ids to complete.
        sampling: Sampling settings; `max_new_tokens` is the default.
        max_tokens: Maximum new tokens in the request, if given.
        stop: Stop strings.
        stream: Whether to stream the answer.
        include_usage: Whether a stream ends with token counts.
    """

    model: str
    prompts: tuple[Any, ...]
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse_body(body: bytes) -> dict[str, Any]:
    """Parses the JSON object of a request; raises APIError."""
    try:
        content = json.loads(body.decode('utf-8'))
    except (ValueError, RecursionError) as error:
        raise APIError(400, f'the body is not valid JSON: {error}', code='invalid_json') from None
    if not isinstance(content, dict):
        raise APIError(400, f'the body must be a JSON object, not {_describe(content)}', code='invalid_json')
    return content


def chat_request(content: Mapping[str, Any], default: Sampling) -> Request:
    """Checks the body of `/v1/chat/completions`; raises APIError."""
    _check_names(content, _CHAT)
    messages = content.get('messages')
    if not isinstance(messages, list) or not messages:
        raise invalid('messages', f'`messages` must be a list of at least one message, not {_describe(messages)}')
    roles = ('system', 'developer', 'user', 'assistant', 'tool')
    for number, message in enumerate(messages):
        role = message.get('role') if isinstance(message, dict) else None
        if role not in roles:
            raise invalid(f'messages[{number}].role', f'`messages[{number}]` needs a `role`, one of {", ".join(roles)}')
        if message.get('content') is None and not message.get('tool_calls'):
            raise invalid(f'messages[{number}].content', f'`messages[{number}]` needs a `content`')
    field = 'max_completion_tokens' if content.get('max_completion_tokens') is not None else 'max_tokens'
    # `loss` and `train` have a meaning only in training data; other fields are passed to the template.
    prompt = [{key: value for key, value in m.items() if key not in ('loss', 'train')} for m in messages]
    return _request(content, (prompt,), field, default)


def completion_request(content: Mapping[str, Any], default: Sampling) -> Request:
    """Checks the body of `/v1/completions`; raises APIError."""
    _check_names(content, _COMPLETION)
    prompt = content.get('prompt')
    if isinstance(prompt, str) or _are_ids(prompt):
        prompts: tuple[Any, ...] = (prompt,)
    elif isinstance(prompt, list) and prompt and all(isinstance(one, str) or _are_ids(one) for one in prompt):
        prompts = tuple(prompt)
    else:
        raise invalid('prompt', '`prompt` must be a text, a list of token ids, or a list of at least one of these')
    if '' in prompts:
        raise invalid('prompt', '`prompt` is empty; it needs at least one character or token id')
    if len(prompts) > MAX_PROMPTS:
        raise invalid(
            'prompt', f'`prompt` contains {len(prompts)} prompts; at most {MAX_PROMPTS} are allowed per request'
        )
    return _request(content, prompts, 'max_tokens', default)


def _request(content: Mapping[str, Any], prompts: tuple[Any, ...], max_tokens: str, default: Sampling) -> Request:
    model = content.get('model')
    if not isinstance(model, str):
        raise invalid('model', '`model` is missing; /v1/models lists the available models')
    options = _value(content, 'stream_options', {}, 'an object', lambda v: isinstance(v, dict))
    usage = _value(options, 'include_usage', False, 'true or false', lambda v: isinstance(v, bool))
    sampling = Sampling(
        default.max_new_tokens,
        _value(content, 'temperature', default.temperature, 'a number from 0 to 2', lambda v: _is_number(v, 2)),
        _value(content, 'top_p', default.top_p, 'a number from 0 to 1', lambda v: _is_number(v, 1)),
        _value(content, 'seed', None, 'an integer', _is_int),
    )
    return Request(
        model,
        prompts,
        sampling,
        _value(content, max_tokens, None, 'an integer of at least 1', lambda v: _is_int(v) and v >= 1),
        _stop(content.get('stop')),
        _value(content, 'stream', False, 'true or false', lambda v: isinstance(v, bool)),
        usage,
    )


def _check_names(content: Mapping[str, Any], used: frozenset[str]) -> None:
    for name, value in content.items():
        if name in used or name in _IGNORED or value is None:
            continue
        if name not in _NEUTRAL:
            raise invalid(name[:64], f'Unknown parameter: {name[:64]!r}.', 'unknown_parameter')
        if not any(value == neutral for neutral in _NEUTRAL[name]):
            raise invalid(name, f'`{name}` is not supported', 'unsupported_parameter')


def _value(content: Mapping[str, Any], name: str, default: Any, text: str, is_valid: Callable[[Any], bool]) -> Any:
    value = content.get(name)
    if value is None:
        return default
    if not is_valid(value):
        raise invalid(name, f'`{name}` must be {text}, not {_describe(value)}')
    return value


def _stop(value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(words, list) or not all(isinstance(w, str) and 0 < len(w) <= MAX_STOP_CHARACTERS for w in words):
        raise invalid(
            'stop', f'`stop` must be a text or a list of texts, each of 1 to {MAX_STOP_CHARACTERS} characters'
        )
    if len(words) > MAX_STOP_STRINGS:
        raise invalid('stop', f'`stop` contains {len(words)} texts; at most {MAX_STOP_STRINGS} are allowed')
    return tuple(words)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_int(id_) for id_ in value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any, maximum: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= maximum


def _describe(value: Any) -> str:
    """Describes a value in an error message: numbers and booleans literally, other values by their type only."""
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 1e12):
        return json.dumps(value)
    names: dict[type, str] = {str: 'a text', list: 'a list', dict: 'an object'}
    return 'an empty list' if value == [] else names.get(type(value), 'a large number')
