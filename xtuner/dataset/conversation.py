"""Conversations: the output of every map function and the input of every template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xtuner.dataset.mapping.unread_fields import is_empty, kind_of, training_flag
from xtuner.errors import DataError
from xtuner.utils.fields import shown

# Role names used by data sets, and the role that each one stands for.
ROLES = {
    'system': 'system', 'developer': 'system',
    'user': 'user', 'human': 'user', 'prompter': 'user',
    'assistant': 'assistant', 'gpt': 'assistant', 'chatgpt': 'assistant', 'bing': 'assistant', 'bard': 'assistant',
    'model': 'assistant', 'bot': 'assistant', 'function_call': 'assistant',
    'tool': 'tool', 'function': 'tool', 'observation': 'tool', 'function_response': 'tool',
    'thoughts': 'thoughts', 'commands': 'commands', 'text': 'text',
}  # fmt: skip

# Roles whose text the model writes. In MOSS, 'thoughts' and 'commands' precede an answer; 'text' is a plain document.
MODEL_ROLES = frozenset({'assistant', 'thoughts', 'commands', 'text'})


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: 'system', 'user', 'assistant' or 'tool'; 'thoughts' and 'commands' for what MOSS writes before an answer;
            'text' for a plain document, which is trained without a template.
        content: The text as written; never parsed for control tokens.
        loss: Whether the message is trained; None leaves the decision to `dataset.train_on`.
        extra: Other fields of the message (`tool_calls`, `name`), for the tokenizer's own chat template.
    """

    role: str
    content: str
    loss: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """Messages in order, the available tools, and `origin` ('file:line' or 'dataset[row]') for error messages."""

    messages: tuple[Message, ...]
    origin: str = ''
    tools: tuple[Any, ...] = ()


def to_conversation(record: Any, origin: str = '') -> Conversation:
    """Converts the return value of a map function into a validated conversation.

    Args:
        record: `{'conversation': [{'system'?, 'input', 'output', 'loss'?}, ...]}` or `{'messages': [{'role', 'content',
                    'loss'?}, ...], 'tools'?}`, or a `Conversation` itself. `'system'` next to either becomes the first
                    message; `'plain': True` next to `conversation` marks the outputs as plain documents (pretraining).
        origin: Where the record came from, for error messages.

    Raises:
        DataError: On a missing or wrong field, an unknown role, or roles out of order; names the origin and the field.
    """
    if isinstance(record, Conversation):
        return _checked(Conversation(record.messages, record.origin or origin, record.tools))
    if not isinstance(record, Mapping):
        raise DataError(f'{origin}: the map function returned {type(record).__name__}, not a dict with `conversation` '
                        'or `messages`')  # fmt: skip
    if 'messages' in record:
        messages = _from_messages(record['messages'], origin)
    elif 'conversation' in record:
        messages = _from_turns(record['conversation'], origin, plain=record.get('plain') is True)
    else:
        raise DataError(f'{origin}: the map function returned the keys {sorted(map(str, record))}; it must return '
                        '`conversation` or `messages`')  # fmt: skip
    if not is_empty(system := record.get('system')):
        messages = _with_system(messages, text_field(system, 'system', origin))
    return _checked(Conversation(messages, origin, _tools(record.get('tools'), origin)))


def to_prompt(messages: Sequence[Message | Mapping[str, Any]]) -> Conversation:
    """Converts messages into a prompt that the model is to answer.

    Unlike in training data, an earlier answer may be empty, a user may send several messages in a row, and the
    assistant may begin; the template decides whether it can render that.

    Raises:
        DataError: On a missing or wrong field, an unknown role or roles out of order, or if the last message is already
            an answer.
    """
    origin = 'the prompt'
    conversation = Conversation(_from_messages([_maybe_empty(message) for message in messages], origin), origin)
    if conversation.messages[-1].role == 'assistant':
        raise DataError('the prompt ends with an answer; it must end with a user or tool message')
    return _checked(conversation, _BEFORE_IN_PROMPT)


def _maybe_empty(message: Message | Mapping[str, Any]) -> Message | Mapping[str, Any]:
    """Returns the message; an empty answer as a `Message`, whose content is not validated further."""
    if not isinstance(message, Mapping) or ROLES.get(str(message.get('role'))) != 'assistant':
        return message
    content = _join_text_parts(message.get('content'), 'content', 'the prompt')
    if not isinstance(content, str) or content.strip():
        return message
    return Message('assistant', content, extra={k: v for k, v in message.items() if k not in ('role', 'content') and v})


def text_field(value: Any, name: str, origin: str, *, empty: bool = True) -> str:
    """Returns `value` if it is text ('' for None); raises DataError with `origin` and `name` otherwise."""
    if value is None and empty:
        return ''
    if not isinstance(value, str):
        raise DataError(f'{origin}: `{name}` must be text, got {type(value).__name__} {shown(value)}')
    if not empty and not value.strip():
        raise DataError(f'{origin}: `{name}` is empty')
    try:
        value.encode('utf-8')
    except UnicodeEncodeError:
        raise DataError(f'{origin}: `{name}` contains a lone surrogate, which is not a character') from None
    return value


def _with_system(messages: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    """Puts a system text first, unless the conversation already begins with the same text."""
    first = messages[0]
    return messages if (first.role, first.content) == ('system', text) else (Message('system', text), *messages)


def _from_turns(turns: Any, origin: str, *, plain: bool) -> tuple[Message, ...]:
    """Reads the input/output form; every turn needs a non-empty `output`."""
    if not isinstance(turns, (list, tuple)) or not turns:
        raise DataError(f'{origin}: `conversation` must be a list with at least one turn, got {shown(turns)}')
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        name = f'conversation[{index}]'
        if not isinstance(turn, Mapping) or 'output' not in turn:
            raise DataError(f'{origin}: `{name}` must be a dict with `input` and `output`, got {shown(turn)}')
        output = text_field(turn['output'], f'{name}.output', origin, empty=False)
        loss, extra = _loss_and_extra(turn, _TURN, name, origin)
        if plain:
            messages.append(Message('text', output, loss, extra))
            continue
        if turn.get('system') is not None:
            messages.append(Message('system', text_field(turn['system'], f'{name}.system', origin)))
        messages.append(Message('user', text_field(turn.get('input'), f'{name}.input', origin)))
        messages.append(Message('assistant', output, loss, extra))
    return tuple(messages)


_TURN, _MESSAGE = frozenset({'system', 'input', 'output'}), frozenset({'role', 'content'})


def _loss_and_extra(
    fields: Mapping[str, Any], read: frozenset[str], name: str, origin: str
) -> tuple[bool | None, dict[str, Any]]:
    """Returns the message's training flag (None if it has none) and its non-empty fields that are not read here."""
    if fields.keys() <= read:  # true for nearly all messages
        return None, {}
    loss, flags = training_flag(fields, name, origin)
    extra = {str(key): value for key, value in fields.items()
             if key not in read and key not in flags and not is_empty(value)}  # fmt: skip
    if extra.get('need_eos_token') is True:  # in classical turns; an end token is always added
        del extra['need_eos_token']
    return loss, extra


def _from_messages(raw: Any, origin: str) -> tuple[Message, ...]:
    if not isinstance(raw, (list, tuple)) or not raw:
        raise DataError(f'{origin}: `messages` must be a list with at least one message, got {shown(raw)}')
    messages = []
    for index, item in enumerate(raw):
        name = f'messages[{index}]'
        if isinstance(item, Message):
            messages.append(item)
            continue
        if not isinstance(item, Mapping) or 'role' not in item:
            raise DataError(f'{origin}: `{name}` must be a dict with `role` and `content`, got {shown(item)}')
        role = ROLES.get(item['role']) if isinstance(item['role'], str) else None
        if role is None:
            raise DataError(f'{origin}: `{name}.role` is {shown(item["role"])}; known: {", ".join(ROLES)}')
        loss, extra = _loss_and_extra(item, _MESSAGE, name, origin)
        optional = role in ('system', 'user') or bool(extra.get('tool_calls'))
        content = _join_text_parts(item.get('content'), f'{name}.content', origin)
        messages.append(Message(role, text_field(content, f'{name}.content', origin, empty=optional), loss, extra))
    return tuple(messages)


def _join_text_parts(content: Any, name: str, origin: str) -> Any:
    """Joins content given as `[{'type': 'text', 'text': ...}]`; raises DataError for other kinds of parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        is_text = isinstance(part, Mapping) and part.get('type') == 'text' and isinstance(part.get('text'), str)
        if not is_text or any(kind_of(str(key)) and not is_empty(value) for key, value in part.items()):
            raise DataError(f'{origin}: `{name}` holds a part that is not text: {shown(part)}; only text is supported')
        texts.append(part['text'])
    return ''.join(texts)


def _tools(tools: Any, origin: str) -> tuple[Any, ...]:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise DataError(f'{origin}: `tools` is not valid JSON: {shown(tools)}') from None
    if is_empty(tools):
        return ()
    if not isinstance(tools, (list, tuple)):
        raise DataError(f'{origin}: `tools` must be a list, got {type(tools).__name__}')
    return tuple(tools)


# Roles that may precede each role; None stands for the start.
_BEFORE: dict[str, set[str | None]] = {
    'system': {None, 'system', 'assistant'},
    'user': {None, 'system', 'assistant', 'tool'},
    'assistant': {'user', 'system', 'tool', 'thoughts', 'commands', 'assistant'},
    'tool': {'assistant', 'tool', 'commands'},
    'thoughts': {'user'},
    'commands': {'thoughts', 'user'},
    'text': {None, 'text'},
}


# The same for prompts.
_BEFORE_IN_PROMPT = _BEFORE | {'user': _BEFORE['user'] | {'user'}, 'assistant': _BEFORE['assistant'] | {None}}


def _checked(conversation: Conversation, allowed: Mapping[str, set[str | None]] = _BEFORE) -> Conversation:
    previous: Message | None = None
    for index, message in enumerate(conversation.messages):
        before = previous.role if previous else None
        # Two answers in a row are one turn only where the first one called a tool.
        two_answers = before == message.role == 'assistant' and not (previous and previous.extra.get('tool_calls'))
        if message.role not in allowed or before not in allowed[message.role] or two_answers:
            what = f'follows {before!r}' if before else 'comes first'
            raise DataError(f'{conversation.origin}: roles out of order: message {index + 1}, {message.role!r}, {what}')
        previous = message
    return conversation
