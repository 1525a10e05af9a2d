"""Renders chat templates of tokenizers within bounds of time, memory and output, in processes of their own.

`render_chats` is the only way to a text: transformers' `apply_chat_template` runs a stranger's program in the process
that calls it, without bounds. Beyond a bound the process is killed and reaped before the error is returned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from xtuner.dataset.templates.worker_pool import MEMORY, POOL
from xtuner.errors import ConfigError, DataError, one_line
from xtuner.utils import escape

SECONDS = 2.0  # processor time of compiling a template, and of showing a conversation
_SECONDS_A_VIEW = 0.02  # and so much more for each further view of it
_PATIENCE = 5  # times the processor time, by the clock: the machine may be busy
MOST_TEMPLATE = 2**20  # characters of a template
_MOST_OUTPUT, _OUTPUT_A_BYTE = 2**20, 8  # characters of a rendering, and so many more for each byte of the conversation
_BATCH, _BATCH_BYTES = 64, 2**22  # conversations sent at a time


class TemplateBoundError(DataError):
    """A chat template took more than it may; no process of it is left."""


class TemplateBusyError(TemplateBoundError):
    """The conversation was not rendered: too many others are slow to render just now. Another time it may be."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template of a tokenizer.

    Attributes:
        text: The Jinja.
        name: Where it is from, for messages.
        variables: What it sees beside the conversation: the named special tokens.
    """

    text: str
    name: str
    variables: Mapping[str, str] = field(default_factory=dict)


class Chat(NamedTuple):
    """A conversation to render.

    Attributes:
        messages: Dicts with `role` and whatever else the template reads.
        tools: The tools on offer, or None.
        views: What to show: how many of the messages, and whether the generation prompt follows them.
        origin: Where it came from, for messages.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None
    views: Sequence[tuple[int, bool]]
    origin: str


def render_chats(template: ChatTemplate, chats: Iterable[Chat]) -> Iterator[list[str] | DataError]:
    """Renders conversations, byte for byte as transformers' `apply_chat_template` does.

    Yields:
        For each conversation the texts of its views, or why there are none: `TemplateBoundError` where a bound was
        reached, another `DataError` where the template refuses the conversation.

    Raises:
        ConfigError: The template cannot be compiled, or the process for it does not start.
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
    """A conversation as JSON; empty where it has no such form."""
    job: dict[str, Any] = {'messages': chat.messages, 'tools': chat.tools, 'views': chat.views}
    job['seconds'] = _seconds(chat)
    try:
        content = json.dumps(job, ensure_ascii=False, default=_plain).encode('utf-8', 'surrogatepass')
    except (RecursionError, TypeError, ValueError):
        return b''
    return content[:-1] + f', "characters": {_most_output(content)}}}'.encode()


def _most_output(content: bytes) -> int:
    return _MOST_OUTPUT + _OUTPUT_A_BYTE * len(content)


def _plain(value: Any) -> Any:
    """What a template sees of a value that JSON does not know: numbers of numpy, and the type's name of others."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.item() if hasattr(value, 'item') and not getattr(value, 'ndim', 0) else f'<{type(value).__name__}>'


def _seconds(chat: Chat) -> float:
    return SECONDS + _SECONDS_A_VIEW * (len(chat.views) - 1)


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
    """Yields the answers; what stands behind one that reached a bound is rendered once it is asked for."""
    done = 0
    while done < len(sent):
        rest = sent[done:]
        patience = [_PATIENCE * (SECONDS + _seconds(chat)) for chat, _ in rest]
        answers = POOL.run(head, [frame for _, frame in rest], patience)
        yield from answers
        done += len(answers)


def _views(texts: list[Any]) -> list[str]:
    whole = texts[0]
    return [whole, *(whole[:same] + rest for same, rest in texts[1:])]


def _error(template: ChatTemplate, chat: Chat, frame: bytes, answer: Mapping[str, str]) -> DataError:
    """The error for an answer without texts; raises ConfigError where no conversation would have one."""
    kind, detail = answer['error'], excerpt(answer.get('message', ''))
    if kind == 'syntax':
        raise ConfigError(f'the chat template of {template.name} is no valid Jinja: {detail}; name one of our '
                          'templates: `model.template` of a config, --prompt-template of a command')  # fmt: skip
    if kind == 'start':
        raise ConfigError(f'the process that renders chat templates does not start ({detail}); it needs jinja2 3.1.6 '
                          'or newer, and processes to be allowed')  # fmt: skip
    if kind == 'busy':
        return TemplateBusyError(f'{chat.origin}: too many conversations on which the chat template is slow are being '
                                  'rendered; try again')  # fmt: skip
    if kind == 'refused':
        return DataError(f'{chat.origin}: the chat template refuses the conversation: {detail}')
    bounds = {
        'time': f'took more than {_seconds(chat):.3g} s of processor time',
        'memory': f'took more than {MEMORY // 2**20} MiB of memory',
        'output': f'wrote more than {_most_output(frame):,} characters',
    }
    why = bounds.get(kind) or {'depth': 'calls itself too deeply', 'crash': f'ended its process: {detail}'}[kind]
    return TemplateBoundError(
        f'{chat.origin}: the chat template of {template.name} {why} and was stopped; change the conversation, or name '
        'another template (`model.template`, --prompt-template)'
    )


def excerpt(text: str, most: int = 200) -> str:
    """Text that a stranger chose, for a message: cut, on one line, with escapes for what moves a terminal's cursor."""
    return escape.printable(one_line(text)[:most])
