"""OpenAI's requests, checked: every field is used, known to be of no consequence here, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from xtuner.inference.generate import Sampling
from xtuner.serve.problems import APIError, wrong

# Accepted and without effect: they are about OpenAI's billing, storage and caches.
_IGNORED = frozenset({'user', 'metadata', 'store', 'service_tier', 'safety_identifier', 'prompt_cache_key'})
# Accepted only with a value that asks for nothing: these are not offered.
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
MOST_STOP_WORDS, MOST_STOP_CHARACTERS = 4, 256
MOST_PROMPTS = 64


@dataclass(frozen=True)
class Request:
    """A request that can be carried out, but for its length.

    Attributes:
        model: Which model is asked.
        prompts: One, the messages of a conversation; or texts, or lists of token ids, to be continued.
        sampling: How answers are drawn; `max_new_tokens` is the default where the request says nothing.
        max_tokens: What the request says of that.
        stop: Words that end an answer.
        stream: Whether the answer comes piece by piece.
        include_usage: Whether a stream ends with the counts.
    """

    model: str
    prompts: tuple[Any, ...]
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a request; raises Problem."""
    try:
        content = json.loads(body.decode('utf-8'))
    except (ValueError, RecursionError) as error:
        raise APIError(400, f'the body is no JSON: {error}', code='invalid_json') from None
    if not isinstance(content, dict):
        raise APIError(400, f'the body must be a JSON object, not {_kind(content)}', code='invalid_json')
    return content


def chat_request(content: Mapping[str, Any], default: Sampling) -> Request:
    """Checks the body of `/v1/chat/completions`; raises Problem."""
    _check_names(content, _CHAT)
    messages = content.get('messages')
    if not isinstance(messages, list) or not messages:
        raise wrong('messages', f'`messages` must be a list of at least one message, not {_kind(messages)}')
    roles = ('system', 'developer', 'user', 'assistant', 'tool')
    for number, message in enumerate(messages):
        role = message.get('role') if isinstance(message, dict) else None
        if role not in roles:
            raise wrong(f'messages[{number}].role', f'`messages[{number}]` needs a `role`, one of {", ".join(roles)}')
        if message.get('content') is None and not message.get('tool_calls'):
            raise wrong(f'messages[{number}].content', f'`messages[{number}]` needs a `content`')
    field = 'max_completion_tokens' if content.get('max_completion_tokens') is not None else 'max_tokens'
    # `loss` and `train` are training's own; further fields go to the template, which may have a place for them.
    asked = [{key: value for key, value in m.items() if key not in ('loss', 'train')} for m in messages]
    return _request(content, (asked,), field, default)


def completion_request(content: Mapping[str, Any], default: Sampling) -> Request:
    """Checks the body of `/v1/completions`; raises Problem."""
    _check_names(content, _COMPLETION)
    prompt = content.get('prompt')
    if isinstance(prompt, str) or _are_ids(prompt):
        prompts: tuple[Any, ...] = (prompt,)
    elif isinstance(prompt, list) and prompt and all(isinstance(one, str) or _are_ids(one) for one in prompt):
        prompts = tuple(prompt)
    else:
        raise wrong('prompt', '`prompt` must be a text, a list of token ids, or a list of at least one of these')
    if '' in prompts:
        raise wrong('prompt', '`prompt` is empty; give it a character or a token id to go on from')
    if len(prompts) > MOST_PROMPTS:
        raise wrong('prompt', f'`prompt` holds {len(prompts)} prompts; at most {MOST_PROMPTS} a request')
    return _request(content, prompts, 'max_tokens', default)


def _request(content: Mapping[str, Any], prompts: tuple[Any, ...], max_tokens: str, default: Sampling) -> Request:
    model = content.get('model')
    if not isinstance(model, str):
        raise wrong('model', '`model` is missing: name one of those that /v1/models lists')
    options = _value(content, 'stream_options', {}, 'an object', lambda v: isinstance(v, dict))
    usage = _value(options, 'include_usage', False, 'true or false', lambda v: isinstance(v, bool))
    sampling = Sampling(
        default.max_new_tokens,
        _value(content, 'temperature', default.temperature, 'a number from 0 to 2', lambda v: _number(v, 2)),
        _value(content, 'top_p', default.top_p, 'a number from 0 to 1', lambda v: _number(v, 1)),
        _value(content, 'seed', None, 'a whole number', _whole),
    )
    return Request(
        model,
        prompts,
        sampling,
        _value(content, max_tokens, None, 'a whole number from 1', lambda v: _whole(v) and v >= 1),
        _stop(content.get('stop')),
        _value(content, 'stream', False, 'true or false', lambda v: isinstance(v, bool)),
        usage,
    )


def _check_names(content: Mapping[str, Any], used: frozenset[str]) -> None:
    for name, value in content.items():
        if name in used or name in _IGNORED or value is None:
            continue
        if name not in _NEUTRAL:
            raise wrong(name[:64], f'Unknown parameter: {name[:64]!r}.', 'unknown_parameter')
        if not any(value == neutral for neutral in _NEUTRAL[name]):
            raise wrong(name, f'`{name}` is not offered here', 'unsupported_parameter')


def _value(content: Mapping[str, Any], name: str, default: Any, what: str, good: Callable[[Any], bool]) -> Any:
    value = content.get(name)
    if value is None:
        return default
    if not good(value):
        raise wrong(name, f'`{name}` must be {what}, not {_kind(value)}')
    return value


def _stop(value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(words, list) or not all(isinstance(w, str) and 0 < len(w) <= MOST_STOP_CHARACTERS for w in words):
        raise wrong('stop', f'`stop` must be a text or a list of texts, each of 1 to {MOST_STOP_CHARACTERS} characters')
    if len(words) > MOST_STOP_WORDS:
        raise wrong('stop', f'`stop` holds {len(words)} texts; at most {MOST_STOP_WORDS}')
    return tuple(words)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_whole(id_) for id_ in value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most


def _kind(value: Any) -> str:
    """A value as an error message may show it: numbers and truth values as they are, of the rest the kind alone."""
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 1e12):
        return json.dumps(value)
    kinds: dict[type, str] = {str: 'a text', list: 'a list', dict: 'an object'}
    return 'an empty list' if value == [] else kinds.get(type(value), 'a large number')
