"""Renders tokenizers' chat templates in worker processes with limits on time, memory and output.

Always use `render_chats`: transformers' `apply_chat_template` runs untrusted code in the calling process without
limits. When a limit is exceeded, the worker is killed and reaped before the error is returned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from xtuner.dataset.templates.worker_pool import MEMORY, POOL
from xtuner.errors import ConfigError, DataError, one_line
from xtuner.utils import escape

SECONDS = 2.0  # CPU time for compiling a template, and for rendering a conversation
_SECONDS_PER_VIEW = 0.02  # additional CPU time for each further view of the conversation
_WALL_TIME_FACTOR = 5  # wall time limit as a multiple of CPU time, since the machine may be busy
MOST_TEMPLATE = 2**20  # maximum characters of a template
_MAX_OUTPUT, _OUTPUT_PER_BYTE = 2**20, 8  # maximum characters of a rendering, and more for each byte of the input
_BATCH, _BATCH_BYTES = 64, 2**22  # conversations, and bytes, sent per request


class TemplateBoundError(DataError):
    """A chat template exceeded a limit; its process has been ended."""


class TemplateBusyError(TemplateBoundError):
    """The conversation was not rendered because too many slow renderings are running; a later retry may succeed."""


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template.

    Attributes:
        text: The Jinja source.
        name: Where it comes from, for error messages.
        variables: Variables that it sees besides the conversation: the named special tokens.
    """

    text: str
    name: str
    variables: Mapping[str, str] = field(default_factory=dict)


class Chat(NamedTuple):
    """A conversation to render.

    Attributes:
        messages: Dicts with `role` and any other fields that the template reads.
        tools: The available tools, or None.
        views: What to render: the number of messages, and whether the generation prompt follows them.
        origin: Where the conversation came from, for error messages.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None
    views: Sequence[tuple[int, bool]]
    origin: str


def render_chats(template: ChatTemplate, chats: Iterable[Chat]) -> Iterator[list[str] | DataError]:
    """Renders conversations, with the same output as transformers' `apply_chat_template`.

    Yields:
        For each conversation the texts of its views, or an error: `TemplateBoundError` if a limit was exceeded, another
        `DataError` if the template rejects the conversation.

    Raises:
        ConfigError: The template cannot be compiled, or the worker process does not start.
    """
    batch: list[tuple[Chat, bytes]] = []
    size = 0
    for chat in chats:
        batch.append((chat, _encoded(chat)))
        size += len(batch[-1][1])
        if len(batch) >= _BATCH or size >= _BATCH_BYTES:
            yield from _rendered(template, batch)
            batch, size = [], 0
    if batch:
        yield from _rendered(template, batch)


def _encoded(chat: Chat) -> bytes:
    """A conversation as JSON; empty if it cannot be serialized."""
    job: dict[str, Any] = {'messages': chat.messages, 'tools': chat.tools, 'views': chat.views}
    job['seconds'] = _seconds(chat)
    try:
        content = json.dumps(job, ensure_ascii=False, default=_plain).encode('utf-8', 'surrogatepass')
    except (RecursionError, TypeError, ValueError):
        return b''
    return content[:-1] + f', "characters": {_most_output(content)}}}'.encode()


def _most_output(content: bytes) -> int:
    return _MAX_OUTPUT + _OUTPUT_PER_BYTE * len(content)


def _plain(value: Any) -> Any:
    """Converts values unknown to JSON: numpy numbers to Python numbers, others to their type's name."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.item() if hasattr(value, 'item') and not getattr(value, 'ndim', 0) else f'<{type(value).__name__}>'


def _seconds(chat: Chat) -> float:
    return SECONDS + _SECONDS_PER_VIEW * (len(chat.views) - 1)


def _rendered(template: ChatTemplate, batch: Sequence[tuple[Chat, bytes]]) -> Iterator[list[str] | DataError]:
    head = {'template': template.text, 'variables': template.variables, 'seconds': SECONDS}
    sent = [(chat, frame) for chat, frame in batch if frame]
    answers = _answers(head, sent)
    for chat, frame in batch:
        if not frame:
            yield DataError(f'{chat.origin}: the conversation is nested too deeply, or holds a key that is not text')
            continue
        answer = next(answers)
        yield _views(answer['texts']) if 'texts' in answer else _error(template, chat, frame, answer)


def _answers(head: dict[str, Any], sent: Sequence[tuple[Chat, bytes]]) -> Iterator[dict[str, Any]]:
    """Yields the answers; conversations after one that exceeded a limit are rendered when their answer is requested."""
    done = 0
    while done < len(sent):
        rest = sent[done:]
        wall_limits = [_WALL_TIME_FACTOR * (SECONDS + _seconds(chat)) for chat, _ in rest]
        answers = POOL.run(head, [frame for _, frame in rest], wall_limits)
        yield from answers
        done += len(answers)


def _views(texts: list[Any]) -> list[str]:
    whole = texts[0]
    return [whole, *(whole[:same] + rest for same, rest in texts[1:])]


def _error(template: ChatTemplate, chat: Chat, frame: bytes, answer: Mapping[str, str]) -> DataError:
    """Returns the error for an answer without texts; raises ConfigError if it applies to every conversation."""
    kind, detail = answer['error'], excerpt(answer.get('message', ''))
    if kind == 'syntax':
        raise ConfigError(f'the chat template of {template.name} is not valid Jinja: {detail}; use a built-in '
                          'template: `model.template` in a config, --prompt-template on the command line')  # fmt: skip
    if kind == 'start':
        raise ConfigError(f'the worker process for chat templates does not start ({detail}); it needs jinja2 3.1.6 '
                          'or newer, and permission to start processes')  # fmt: skip
    if kind == 'busy':
        return TemplateBusyError(f'{chat.origin}: too many slow conversations are being rendered by the chat template; '
                                  'try again')  # fmt: skip
    if kind == 'refused':
        return DataError(f'{chat.origin}: the chat template rejects the conversation: {detail}')
    bounds = {
        'time': f'took more than {_seconds(chat):.3g} s of CPU time',
        'memory': f'took more than {MEMORY // 2**20} MiB of memory',
        'output': f'wrote more than {_most_output(frame):,} characters',
    }
    why = bounds.get(kind) or {'depth': 'recurses too deeply', 'crash': f'crashed its process: {detail}'}[kind]
    return TemplateBoundError(
        f'{chat.origin}: the chat template of {template.name} {why} and was stopped; change the conversation, or name '
        'another template (`model.template`, --prompt-template)'
    )


def excerpt(text: str, most: int = 200) -> str:
    """Untrusted text for a message: truncated, on one line, with terminal control characters escaped."""
    return escape.printable(one_line(text)[:most])
